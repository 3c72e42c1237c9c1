"""The bytes of a slab file: superblock, headers, and where payloads are.

    offset 0                superblock: geometry, cache root, first sequence number that counts
    offset 4096             headers, 128 bytes a slot, one after the other
    offset `data_offset`    payloads, `slot_stride` bytes a slot, all multiples of 4096

A header (little-endian):

    0   magic "xKVb"             8   sequence number      48  payload checksum (xxh3-128)
    4   format version, u16      16  block hash           64  payload length, u64
    6   zeros                    32  parent's hash        72  zeros
                                                          120 xxh3-64 of bytes 0..120

All headers lie together so that an index is rebuilt from one sequential read; payloads are aligned
so that they can bypass the page cache. A header of zeros is an empty slot. What order of writes
keeps the file sound is the matter of `slab.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from xllm.protocol import BlockHash

Buffer = npt.NDArray[np.uint8]
"""One-dimensional and contiguous."""

ALIGNMENT = 4096
"""Of file offsets, lengths and memory for O_DIRECT: enough for every disk in use."""

FORMAT_VERSION = 1
HEADER_BYTES = 128

MAX_SEQUENCE = (1 << 63) - 1
"""No slab lives to see it; whatever says more was not written by us."""

_MAGIC = b"xKVb"
_SUPERBLOCK_MAGIC = b"xKVslab\n"
_SUPERBLOCK = struct.Struct("<8sQQQ16sQ")
_HEADER = struct.Struct("<4sH2xQ16s16s16sQ48x")
_CHECKSUM = struct.Struct("<Q")
assert _HEADER.size + _CHECKSUM.size == HEADER_BYTES

_SCANNED_FIELDS = np.dtype(
    {
        "names": ["magic", "version", "sequence", "payload_bytes"],
        "formats": ["S4", "<u2", "<u8", "<u8"],
        "offsets": [0, 4, 8, 64],
        "itemsize": HEADER_BYTES,
    }
)

_NO_PARENT = bytes(16)

_METADATA_RESERVE = 64 << 10
"""Bytes left for the file system's own blocks (extent trees), which count as the file's."""


def round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def checksum_of(payload: Buffer) -> bytes:
    """xxh3-128: faster than memory; the interpreter's lock is free meanwhile."""
    return xxhash.xxh3_128_digest(payload.data)


@dataclass(frozen=True, slots=True)
class SlabGeometry:
    """Everything that decides where a byte of the file is."""

    num_slots: int
    payload_bytes: int

    @classmethod
    def within(cls, size_bytes: int, payload_bytes: int) -> SlabGeometry:
        """The most slots whose file takes no more than `size_bytes` of disk, metadata included."""
        room = size_bytes - _METADATA_RESERVE - 2 * ALIGNMENT
        return cls(max(0, room // (round_up(payload_bytes) + HEADER_BYTES)), payload_bytes)

    @property
    def slot_stride(self) -> int:
        return round_up(self.payload_bytes)

    @property
    def data_offset(self) -> int:
        return round_up(ALIGNMENT + self.num_slots * HEADER_BYTES)

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.num_slots * self.slot_stride

    def header_offset(self, slot: int) -> int:
        return ALIGNMENT + slot * HEADER_BYTES

    def payload_offset(self, slot: int) -> int:
        return self.data_offset + slot * self.slot_stride


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What a valid header says. `sequence` orders the stores of a slab's whole life."""

    slot: int
    sequence: int
    hash: BlockHash
    parent: BlockHash | None
    checksum: bytes


SUPERBLOCK_BYTES = _SUPERBLOCK.size + _CHECKSUM.size


def encode_superblock(geometry: SlabGeometry, root: BlockHash, first_sequence: int) -> bytes:
    """Headers with a sequence below `first_sequence` do not count: they have been cleared."""
    fields = _SUPERBLOCK.pack(
        _SUPERBLOCK_MAGIC,
        FORMAT_VERSION,
        geometry.num_slots,
        geometry.payload_bytes,
        root,
        first_sequence,
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def decode_superblock(raw: bytes, geometry: SlabGeometry, root: BlockHash) -> int | None:
    """The first sequence that counts; None: not the superblock of such a slab."""
    if len(raw) != SUPERBLOCK_BYTES:
        return None
    first_sequence: int = _SUPERBLOCK.unpack_from(raw)[-1]
    if first_sequence > MAX_SEQUENCE:
        return None
    return first_sequence if raw == encode_superblock(geometry, root, first_sequence) else None


def encode_header(record: SlotRecord, payload_bytes: int) -> bytes:
    fields = _HEADER.pack(
        _MAGIC,
        FORMAT_VERSION,
        record.sequence,
        record.hash,
        record.parent or _NO_PARENT,
        record.checksum,
        payload_bytes,
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def decode_headers(raw: Buffer, payload_bytes: int, first_sequence: int) -> list[SlotRecord]:
    """The valid ones of a whole header region, by sequence. raw: [num_slots * HEADER_BYTES]."""
    fields = raw.view(_SCANNED_FIELDS)
    plausible = np.flatnonzero(
        (fields["magic"] == _MAGIC)
        & (fields["version"] == FORMAT_VERSION)
        & (fields["payload_bytes"] == payload_bytes)
        & (fields["sequence"] >= first_sequence)
        & (fields["sequence"] <= MAX_SEQUENCE)
    )
    order = np.argsort(fields["sequence"][plausible], kind="stable")
    view = raw.data
    records = []
    for slot in plausible[order].tolist():
        start = slot * HEADER_BYTES
        header = view[start : start + _HEADER.size]
        (checksum,) = _CHECKSUM.unpack_from(view, start + _HEADER.size)
        if xxhash.xxh3_64_intdigest(header) == checksum:
            _, _, sequence, block_hash, parent, payload_checksum, _ = _HEADER.unpack(header)
            records.append(
                SlotRecord(
                    slot,
                    sequence,
                    BlockHash(block_hash),
                    None if parent == _NO_PARENT else BlockHash(parent),
                    payload_checksum,
                )
            )
    return records


def adjacent_runs(slots: Sequence[int]) -> list[slice]:
    """Cuts ascending slots into index ranges of neighbours: what one call can cover."""
    runs = []
    start = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1:
            runs.append(slice(start, i))
            start = i
    return runs
