"""How a worker's cache events look in etcd: `docs/index-format.md` has every byte. Pure.

    delta    d/{seq}      what changed since the batch before: sections of STORED, REMOVED, CLEARED
    chunk    s/{gen}/{i}  a part of all that was held at `base_seq`: sections of STORED
    head     head         which snapshot is whole, and the last delta that it includes

Decoding allocates in proportion to the bytes that are there, never to what they claim: a count is
believed only when the hashes that it counts follow. What does not decode as a whole is refused as
a whole.

Blocks are named by the first 8 bytes of their hash, here an int. Two blocks that share these bytes
can only misroute a request, because workers match all 16.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from xllm.cache.block_pool import BlockEventKind
from xllm.protocol import BlockHash

FORMAT_VERSION = 1

MAX_VALUE_BYTES = 1 << 20
"""Of one key; etcd takes 1.5 MiB per request, compares and keys included."""

HASH_BYTES = 8

_PREFIX = struct.Struct("<BB")
_SECTION = struct.Struct("<BI")
_HEAD = struct.Struct("<BBQIQ")


class TierCode(enum.IntEnum):
    """The tiers from fast to slow, as the format numbers them."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    REMOTE = 3


NUM_TIERS = len(TierCode)


class ValueKind(enum.IntEnum):
    DELTA = 1
    CHUNK = 2
    HEAD = 3


_KIND_CODES = {BlockEventKind.STORED: 1, BlockEventKind.REMOVED: 2, BlockEventKind.CLEARED: 3}
_OPCODES = {
    kind_code << 4 | tier: (tier, kind)
    for kind, kind_code in _KIND_CODES.items()
    for tier in TierCode
}


class BadValue(ValueError):
    """A value under `cache/` that this version cannot read."""


@dataclass(frozen=True, slots=True)
class Section:
    """Events of one kind in one tier; of CLEARED, `hashes` is empty."""

    tier: TierCode
    kind: BlockEventKind
    hashes: Sequence[int] = ()

    @property
    def num_bytes(self) -> int:
        return _SECTION.size + HASH_BYTES * len(self.hashes)


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Sections that hold in their order."""

    sections: tuple[Section, ...] = ()

    @property
    def num_blocks(self) -> int:
        return sum(len(section.hashes) for section in self.sections)

    @property
    def num_bytes(self) -> int:
        """Of the encoded value."""
        return _PREFIX.size + sum(section.num_bytes for section in self.sections)


@dataclass(frozen=True, slots=True)
class Head:
    """The snapshot `gen` has `chunks` chunks and includes the deltas up to `base_seq`."""

    gen: int
    chunks: int
    base_seq: int


def short_hash(block_hash: BlockHash) -> int:
    """The name of a block in the index."""
    return int.from_bytes(block_hash[:HASH_BYTES], "little")


def short_hashes(block_hashes: Sequence[BlockHash]) -> tuple[int, ...]:
    """`short_hash` of each, at once."""
    return struct.unpack("<" + "Q8x" * len(block_hashes), b"".join(block_hashes))


def encode_delta(batch: EventBatch) -> bytes:
    return _encode_sections(ValueKind.DELTA, batch)


def encode_chunk(batch: EventBatch) -> bytes:
    """Of a batch that has only STORED."""
    return _encode_sections(ValueKind.CHUNK, batch)


def encode_head(head: Head) -> bytes:
    return _HEAD.pack(FORMAT_VERSION, ValueKind.HEAD, head.gen, head.chunks, head.base_seq)


def decode_delta(value: bytes) -> EventBatch:
    """Raises: BadValue."""
    return EventBatch(tuple(_decode_sections(value, ValueKind.DELTA)))


def decode_chunk(value: bytes) -> EventBatch:
    """Raises: BadValue."""
    sections = tuple(_decode_sections(value, ValueKind.CHUNK))
    for section in sections:
        if section.kind is not BlockEventKind.STORED:
            raise BadValue(f"{section.kind.value} in a snapshot chunk")
    return EventBatch(sections)


def decode_head(value: bytes) -> Head:
    """Raises: BadValue."""
    _check_prefix(value, ValueKind.HEAD)
    if len(value) != _HEAD.size:
        raise BadValue(f"a head of {len(value)} bytes, expected {_HEAD.size}")
    _, _, gen, chunks, base_seq = _HEAD.unpack(value)
    return Head(gen, chunks, base_seq)


def split_stored(
    tier: TierCode, hashes: Sequence[int], max_bytes: int = MAX_VALUE_BYTES
) -> Iterator[EventBatch]:
    """All of `hashes` as chunks of at most `max_bytes` each."""
    per_chunk = (max_bytes - _PREFIX.size - _SECTION.size) // HASH_BYTES
    iterator = iter(hashes)
    while part := tuple(islice(iterator, per_chunk)):
        yield EventBatch((Section(tier, BlockEventKind.STORED, part),))


def _encode_sections(value_kind: ValueKind, batch: EventBatch) -> bytes:
    parts = [_PREFIX.pack(FORMAT_VERSION, value_kind)]
    for section in batch.sections:
        count = len(section.hashes)
        parts.append(_SECTION.pack(_KIND_CODES[section.kind] << 4 | section.tier, count))
        parts.append(struct.pack(f"<{count}Q", *section.hashes))
    return b"".join(parts)


def _decode_sections(value: bytes, value_kind: ValueKind) -> Iterator[Section]:
    _check_prefix(value, value_kind)
    offset = _PREFIX.size
    while offset < len(value):
        if len(value) - offset < _SECTION.size:
            raise BadValue(f"{len(value) - offset} bytes are left, a section has {_SECTION.size}")
        opcode, count = _SECTION.unpack_from(value, offset)
        offset += _SECTION.size
        if opcode not in _OPCODES:
            raise BadValue(f"unknown section {opcode:#04x}")
        tier, kind = _OPCODES[opcode]
        if count * HASH_BYTES > len(value) - offset:
            raise BadValue(f"{count} hashes in {len(value) - offset} bytes")
        if (kind is BlockEventKind.CLEARED) != (count == 0):
            raise BadValue(f"{kind.value} with {count} hashes")
        yield Section(tier, kind, struct.unpack_from(f"<{count}Q", value, offset))
        offset += count * HASH_BYTES


def _check_prefix(value: bytes, value_kind: ValueKind) -> None:
    if len(value) < _PREFIX.size:
        raise BadValue(f"{len(value)} bytes, expected at least {_PREFIX.size}")
    version, kind = _PREFIX.unpack_from(value)
    if version != FORMAT_VERSION:
        raise BadValue(f"format version {version}, expected {FORMAT_VERSION}: run one release")
    if kind != value_kind:
        raise BadValue(f"value kind {kind}, expected {value_kind} ({value_kind.name})")
