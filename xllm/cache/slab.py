"""A file of fixed slots that survives its process: opening, reading and writing it.

What makes a torn slot a miss, whenever the process or the machine dies (`slab_format.py` has the
layout):

 1. A slot's header is zeroed before its payload is overwritten, and written after it.
 2. A header counts only if its own checksum holds.
 3. Whoever reads a payload compares its checksum with the header's (the caller does, `read` moves
    bytes only). So even where a power cut reorders what the page cache had not written yet, no
    wrong byte gets through.

Payloads bypass the page cache (O_DIRECT) where the file system lets them: they are in the
process's memory anyway. Headers go through it: many are written with one page.

The file is allocated in full when it is made, and never grows. Transfers are thread-safe as long as
nobody writes a slot that another thread reads or writes; `tier.SlotTable` sees to that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from xllm.cache.slab_format import (
    ALIGNMENT,
    HEADER_BYTES,
    SUPERBLOCK_BYTES,
    Buffer,
    SlabGeometry,
    SlotRecord,
    adjacent_runs,
    decode_headers,
    decode_superblock,
    encode_header,
    encode_superblock,
    round_up,
)
from xllm.errors import ConfigError, TierIOError
from xllm.protocol import BlockHash

logger = logging.getLogger(__name__)

SLAB_NAME = "blocks.slab"

FIRST_SEQUENCE = 1

_MAX_IOV = 512


class VectorIO(Protocol):
    """The system calls that move bytes: the seam where tests inject faults."""

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int: ...

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int: ...


class _OsIO:
    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)


OS_IO: VectorIO = _OsIO()


def aligned_buffer(num_bytes: int) -> Buffer:
    """Zeroed memory that O_DIRECT takes; freed with the last reference to it."""
    return np.frombuffer(mmap.mmap(-1, round_up(num_bytes)), dtype=np.uint8)[:num_bytes]


def is_aligned(buffer: Buffer) -> bool:
    """Whether O_DIRECT takes this memory."""
    return buffer.ctypes.data % ALIGNMENT == 0 and buffer.nbytes % ALIGNMENT == 0


@dataclass(frozen=True, slots=True)
class SlotWrite:
    """One block to write. `payload`: `slot_stride` bytes; aligned, where `is_direct`."""

    record: SlotRecord
    payload: Buffer


class SlabFile:
    """An open, locked slab. Everything that the medium refuses is `TierIOError`."""

    def __init__(
        self, directory: Path, geometry: SlabGeometry, root: BlockHash, *, io: VectorIO = OS_IO
    ) -> None:
        """Opens `directory`'s slab, or makes it; one of another geometry or root is replaced.

        Raises: ConfigError if another process uses it; TierIOError.
        """
        self.geometry = geometry
        self.path = directory / SLAB_NAME
        self.is_direct = False
        self.first_sequence = FIRST_SEQUENCE
        """Headers with a lower one have been cleared."""
        self._root = root
        self._io = io
        self._fd = -1
        self._direct_fd = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._lock()
            self.first_sequence = self._read_superblock() or self._format()
            self._direct_fd = self._open_direct()
        except OSError as error:
            self.close()
            raise TierIOError(f"cannot open {self.path}: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the lock back. Idempotent; no transfer may be under way."""
        for fd in {self._fd, self._direct_fd} - {-1}:
            os.close(fd)
        self._fd = self._direct_fd = -1

    def sync(self) -> None:
        """Waits until everything written is on the medium. Raises: TierIOError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise TierIOError(f"cannot sync {self.path}: {error}") from error

    def scan(self) -> list[SlotRecord]:
        """Every slot with a valid header, oldest store first. Raises: TierIOError."""
        raw = np.empty(self.geometry.num_slots * HEADER_BYTES, dtype=np.uint8)
        self._read(self._fd, [raw], self.geometry.header_offset(0))
        return decode_headers(raw, self.geometry.payload_bytes, self.first_sequence)

    def read(self, first_slot: int, buffers: Sequence[Buffer]) -> None:
        """Reads the payloads of neighbouring slots in as few calls as can be.

        buffers: `slot_stride` bytes each; aligned, where `is_direct`. Raises: TierIOError; what
        the buffers hold is undefined then.
        """
        self._check_linked()
        self._read(self._direct_fd, buffers, self.geometry.payload_offset(first_slot))

    def write(self, writes: Sequence[SlotWrite]) -> None:
        """Writes blocks, each one so that it is either there or a miss. Raises: TierIOError."""
        self._check_linked()
        ordered = sorted(writes, key=lambda write: write.record.slot)
        slots = [write.record.slot for write in ordered]
        self.invalidate(slots)
        runs = adjacent_runs(slots)
        for run in runs:
            payloads = [write.payload for write in ordered[run]]
            self._write(self._direct_fd, payloads, self.geometry.payload_offset(slots[run.start]))
        payload_bytes = self.geometry.payload_bytes
        for run in runs:
            headers = b"".join(encode_header(w.record, payload_bytes) for w in ordered[run])
            self._write_headers(slots[run.start], headers)

    def forget_before(self, sequence: int) -> None:
        """Makes everything with a lower sequence number a miss for good. Raises: TierIOError."""
        superblock = encode_superblock(self.geometry, self._root, sequence)
        self._write(self._fd, [np.frombuffer(superblock, dtype=np.uint8)], 0)
        self.first_sequence = sequence

    def invalidate(self, slots: Sequence[int]) -> None:
        """Makes slots misses. slots: ascending. Raises: TierIOError."""
        for run in adjacent_runs(slots):
            self._write_headers(slots[run.start], bytes((run.stop - run.start) * HEADER_BYTES))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--disk_cache_dir: {self.path} is in use by another process; "
                "give each worker a directory of its own"
            ) from None

    def _read_superblock(self) -> int | None:
        if os.fstat(self._fd).st_size != self.geometry.file_bytes:
            return None
        return decode_superblock(os.pread(self._fd, SUPERBLOCK_BYTES, 0), self.geometry, self._root)

    def _format(self) -> int:
        """Empties the file, allocates all of it, and writes the superblock last."""
        os.ftruncate(self._fd, 0)
        try:
            os.posix_fallocate(self._fd, 0, self.geometry.file_bytes)
        except OSError:
            os.ftruncate(self._fd, 0)
            raise
        self.forget_before(FIRST_SEQUENCE)
        logger.info("slab_created path=%s slots=%d", self.path, self.geometry.num_slots)
        return FIRST_SEQUENCE

    def _open_direct(self) -> int:
        """A second descriptor that bypasses the page cache, or the first one where that fails.

        Some file systems refuse O_DIRECT in open, others in the first read; both say EINVAL.
        """
        fd = -1
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
            os.preadv(fd, [aligned_buffer(ALIGNMENT).data], 0)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno != errno.EINVAL:
                raise
            logger.info("slab_without_direct_io path=%s", self.path)
            return self._fd
        self.is_direct = True
        return fd

    def _check_linked(self) -> None:
        """A deleted file can still be written to, but nobody will ever find it again."""
        try:
            is_linked = os.fstat(self._fd).st_nlink > 0
        except OSError as error:
            raise TierIOError(f"cannot stat {self.path}: {error}") from error
        if not is_linked:
            raise TierIOError(f"{self.path} has been removed")

    def _read(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        for first in range(0, len(buffers), _MAX_IOV):
            rest = [buffer.data for buffer in buffers[first : first + _MAX_IOV]]
            while rest:
                try:
                    num_bytes = self._io.preadv(fd, rest, offset)
                except OSError as error:
                    raise TierIOError(f"cannot read {self.path}: {error}") from error
                if num_bytes == 0:
                    raise TierIOError(f"cannot read {self.path}: it ends at {offset}")
                offset += num_bytes
                rest = _after(rest, num_bytes)

    def _write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        for first in range(0, len(buffers), _MAX_IOV):
            rest = [buffer.data for buffer in buffers[first : first + _MAX_IOV]]
            while rest:
                try:
                    num_bytes = self._io.pwritev(fd, rest, offset)
                except OSError as error:
                    raise TierIOError(f"cannot write {self.path}: {error}") from error
                if num_bytes == 0:
                    raise TierIOError(f"cannot write {self.path}: nothing written at {offset}")
                offset += num_bytes
                rest = _after(rest, num_bytes)

    def _write_headers(self, first_slot: int, headers: bytes) -> None:
        buffer = np.frombuffer(headers, dtype=np.uint8)
        self._write(self._fd, [buffer], self.geometry.header_offset(first_slot))


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `buffers` after their first `num_bytes`."""
    for i, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer[num_bytes:], *buffers[i + 1 :]]
        num_bytes -= buffer.nbytes
    return []
