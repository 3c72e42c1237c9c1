"""The slab file on a real disk: what is complete is found again, what is torn is a miss."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm.cache.slab import SLAB_NAME, SlabFile, SlotWrite, VectorIO, aligned_buffer, is_aligned
from xllm.cache.slab_format import (
    HEADER_BYTES,
    Buffer,
    SlabGeometry,
    SlotRecord,
    adjacent_runs,
    encode_header,
)
from xllm.errors import ConfigError, TierIOError
from xllm.protocol import BlockHash

PAYLOAD_BYTES = 5000
ROOT = BlockHash(b"r" * 16)


def name(i: int) -> BlockHash:
    return BlockHash(sha256(str(i).encode()).digest()[:16])


def payload(i: int, payload_bytes: int = PAYLOAD_BYTES) -> Buffer:
    """Bytes that only block i has, in aligned memory of a whole stride."""
    stride = SlabGeometry(1, payload_bytes).slot_stride
    buffer = aligned_buffer(stride)
    buffer[:] = np.random.default_rng(i).integers(0, 256, stride, dtype=np.uint8)
    return buffer


def write_of(i: int, slot: int, sequence: int = 1, payload_bytes: int = PAYLOAD_BYTES) -> SlotWrite:
    buffer = payload(i, payload_bytes)
    checksum = xxhash.xxh3_128_digest(buffer[:payload_bytes])
    return SlotWrite(SlotRecord(slot, sequence, name(i), name(i + 1), checksum), buffer)


def read_block(slab: SlabFile, record: SlotRecord) -> Buffer | None:
    """The payload, or None if its checksum does not hold: as the disk tier reads."""
    buffer = aligned_buffer(slab.geometry.slot_stride)
    slab.read(record.slot, [buffer])
    content = buffer[: slab.geometry.payload_bytes]
    return content if xxhash.xxh3_128_digest(content) == record.checksum else None


def check_contents(slab: SlabFile, expected: set[int], ids: int = 64) -> None:
    """Every block that comes back is right, and those of `expected` do come back."""
    by_hash = {name(i): i for i in range(ids)}
    found = set()
    for record in slab.scan():
        content = read_block(slab, record)
        if content is not None:
            i = by_hash[record.hash]
            assert np.array_equal(content, payload(i)[:PAYLOAD_BYTES])
            found.add(i)
    assert expected <= found


class TornIO:
    """Dies at the n-th write, after some of its bytes."""

    class Crash(Exception):
        pass

    def __init__(self, num_writes: int, share: float) -> None:
        self.num_writes = num_writes
        self.share = share

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        if self.num_writes == 0:
            whole = np.concatenate([np.frombuffer(b, dtype=np.uint8) for b in buffers])
            torn = whole[: int(len(whole) * self.share)]
            with open(f"/proc/self/fd/{fd}", "r+b") as file:
                file.seek(offset)
                file.write(torn.tobytes())
            raise self.Crash
        self.num_writes -= 1
        return os.pwritev(fd, buffers, offset)


class FailingIO:
    """Refuses with `error` while it is set, and moves at most `max_bytes` at a time."""

    def __init__(self) -> None:
        self.error = 0
        self.max_bytes = 1 << 30

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._fail()
        return os.preadv(fd, [buffers[0][: self.max_bytes]], offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._fail()
        return os.pwritev(fd, [buffers[0][: self.max_bytes]], offset)

    def _fail(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


def open_slab(path: Path, num_slots: int = 8, io: VectorIO | None = None) -> SlabFile:
    geometry = SlabGeometry(num_slots, PAYLOAD_BYTES)
    return SlabFile(path, geometry, ROOT, **({} if io is None else {"io": io}))


def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    slab = open_slab(tmp_path)
    slab.write([write_of(3, 5, sequence=2), write_of(1, 0, sequence=7), write_of(2, 4, sequence=1)])
    slab.close()
    slab = open_slab(tmp_path)
    records = slab.scan()
    assert [(r.slot, r.sequence, r.hash) for r in records] == [
        (4, 1, name(2)),
        (5, 2, name(3)),
        (0, 7, name(1)),
    ]
    assert records[0].parent == name(3)
    check_contents(slab, {1, 2, 3})
    slab.close()


def test_neighbours_are_read_in_one_call(tmp_path: Path) -> None:
    slab = open_slab(tmp_path)
    slab.write([write_of(i, i) for i in range(8)])
    buffers = [aligned_buffer(slab.geometry.slot_stride) for _ in range(5)]
    slab.read(2, buffers)
    for i, buffer in enumerate(buffers):
        assert np.array_equal(buffer, payload(i + 2))
    slab.close()


@given(num_bytes=st.integers(0, 40 << 20), payload_bytes=st.sampled_from([1, 4096, 5000, 737280]))
def test_a_geometry_stays_within_its_limit(num_bytes: int, payload_bytes: int) -> None:
    geometry = SlabGeometry.within(num_bytes, payload_bytes)
    assert geometry.num_slots == 0 or geometry.file_bytes <= num_bytes
    more = SlabGeometry(geometry.num_slots + 1, payload_bytes)
    assert more.file_bytes > num_bytes - (128 << 10), "space is wasted"


def test_the_file_takes_the_disk_space_asked_for_and_no_more(tmp_path: Path) -> None:
    size = 3 << 20
    slab = SlabFile(tmp_path, SlabGeometry.within(size, PAYLOAD_BYTES), ROOT)
    slab.write([write_of(i, i) for i in range(20)])
    slab.sync()
    used = os.stat(slab.path).st_blocks * 512
    assert size * 0.9 < used <= size
    slab.close()


def test_another_geometry_or_root_starts_empty(tmp_path: Path) -> None:
    slab = open_slab(tmp_path)
    slab.write([write_of(1, 0)])
    slab.close()
    for geometry, root in (
        (SlabGeometry(8, PAYLOAD_BYTES), BlockHash(b"q" * 16)),
        (SlabGeometry(9, PAYLOAD_BYTES), BlockHash(b"q" * 16)),
        (SlabGeometry(9, PAYLOAD_BYTES + 1), BlockHash(b"q" * 16)),
    ):
        slab = SlabFile(tmp_path, geometry, root)
        assert slab.scan() == []
        slab.write([write_of(1, 0, payload_bytes=geometry.payload_bytes)])
        slab.close()


def test_what_was_cleared_stays_cleared(tmp_path: Path) -> None:
    slab = open_slab(tmp_path)
    slab.write([write_of(i, i, sequence=i + 1) for i in range(4)])
    slab.forget_before(3)
    assert [r.hash for r in slab.scan()] == [name(2), name(3)]
    slab.close()
    slab = open_slab(tmp_path)
    assert slab.first_sequence == 3
    check_contents(slab, {2, 3})
    assert len(slab.scan()) == 2
    slab.close()


def test_two_openers_never_share(tmp_path: Path) -> None:
    slab = open_slab(tmp_path)
    with pytest.raises(ConfigError, match=r"--disk_cache_dir.*in use"):
        open_slab(tmp_path)
    code = f"from tests.integration.test_slab import *; open_slab(Path({str(tmp_path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: --disk_cache_dir" in other.stderr
    slab.close()
    open_slab(tmp_path).close()


def test_a_flipped_bit_anywhere_is_a_miss(tmp_path: Path) -> None:
    geometry = SlabGeometry(1, PAYLOAD_BYTES)
    offsets = [geometry.header_offset(0) + i for i in range(HEADER_BYTES)]
    offsets += [geometry.payload_offset(0), geometry.payload_offset(0) + PAYLOAD_BYTES - 1]
    slab = open_slab(tmp_path, 1)
    slab.write([write_of(1, 0)])
    with open(slab.path, "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            good = file.read(1)
            for content in (bytes([good[0] ^ 0x10]), good):
                file.seek(offset)
                file.write(content)
                file.flush()
                whole = [r for r in slab.scan() if read_block(slab, r) is not None]
                assert len(whole) == (content == good)
    slab.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slots=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    num_writes=st.integers(0, 9),
    share=st.floats(0, 1),
)
def test_a_crash_at_any_write_loses_only_what_was_being_written(
    tmp_path: Path, slots: list[int], num_writes: int, share: float
) -> None:
    slab = open_slab(tmp_path, 4)
    slab.write([write_of(i, i) for i in range(4)])
    slab.close()
    io = TornIO(num_writes, share)
    slab = open_slab(tmp_path, 4, io)
    expected = set(range(4)) - set(slots)
    try:
        slab.write([write_of(10 + slot, slot, sequence=9) for slot in slots])
        expected |= {10 + slot for slot in slots}
    except TornIO.Crash:
        pass
    slab.close()
    slab = open_slab(tmp_path, 4)
    check_contents(slab, expected)
    slab.close()


def test_a_slot_whose_payload_was_being_written_is_not_even_indexed(tmp_path: Path) -> None:
    slab = open_slab(tmp_path, 4)
    slab.write([write_of(i, i) for i in range(4)])
    slab.close()
    slab = open_slab(tmp_path, 4, TornIO(num_writes=1, share=0.5))
    with pytest.raises(TornIO.Crash):
        slab.write([write_of(10, 1, sequence=9)])
    slab.close()
    slab = open_slab(tmp_path, 4)
    assert sorted(record.slot for record in slab.scan()) == [0, 2, 3]
    slab.close()


WRITER = """
from tests.integration.test_slab import *
slab = open_slab(Path(sys.argv[1]), 16)
for i in range(10**9):
    slab.write([write_of(i % 64, (i * 7 + k) % 16, i + 1) for k in range(1)])
    print(i, flush=True)
"""


def test_kill_in_the_middle_of_writes(tmp_path: Path) -> None:
    for num_lines in (20, 33, 47):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        last = [int(writer.stdout.readline()) for _ in range(num_lines)][-1]
        writer.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in writer.stdout if line.strip().isdigit())])
        writer.stdout.close()
        writer.wait(timeout=30)
        slab = open_slab(tmp_path, 16)
        # The write after the last one that was reported may have been under way.
        torn = (last + 1) * 7 % 16
        expected = {i % 64 for i in range(max(0, last - 15), last + 1) if i * 7 % 16 != torn}
        check_contents(slab, expected)
        slab.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_what_the_medium_refuses_is_a_tier_error(tmp_path: Path, code: int) -> None:
    io = FailingIO()
    slab = open_slab(tmp_path, io=io)
    slab.write([write_of(1, 0)])
    io.error = code
    buffer = aligned_buffer(slab.geometry.slot_stride)
    with pytest.raises(TierIOError, match=os.strerror(code)):
        slab.read(0, [buffer])
    with pytest.raises(TierIOError, match=os.strerror(code)):
        slab.write([write_of(2, 1)])
    with pytest.raises(TierIOError):
        slab.scan()
    io.error = 0
    check_contents(slab, {1})
    slab.close()


def test_short_transfers_go_on_where_they_stopped(tmp_path: Path) -> None:
    io = FailingIO()
    io.max_bytes = 4096
    slab = open_slab(tmp_path, io=io)
    slab.write([write_of(i, i) for i in range(8)])
    check_contents(slab, set(range(8)))
    slab.close()


def test_a_truncated_file_is_a_tier_error(tmp_path: Path) -> None:
    slab = open_slab(tmp_path)
    os.truncate(slab.path, slab.geometry.data_offset)
    with pytest.raises(TierIOError, match="it ends"):
        slab.read(0, [aligned_buffer(slab.geometry.slot_stride)])
    slab.close()


def test_a_removed_directory_is_a_tier_error(tmp_path: Path) -> None:
    slab = open_slab(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(TierIOError, match="removed"):
        slab.write([write_of(1, 0)])
    with pytest.raises(TierIOError, match="removed"):
        slab.read(0, [aligned_buffer(slab.geometry.slot_stride)])
    slab.close()


def test_a_directory_that_cannot_be_made_is_a_tier_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierIOError, match="cannot open"):
        open_slab(tmp_path / "file" / "cache")


def test_a_disk_too_small_is_a_tier_error_and_keeps_no_space() -> None:
    shm = Path("/dev/shm") / f"xllm-test-{os.getpid()}"
    total = shutil.disk_usage("/dev/shm").total
    try:
        with pytest.raises(TierIOError, match="cannot open"):
            SlabFile(shm, SlabGeometry.within(total + (1 << 30), 1 << 20), ROOT)
        assert (shm / SLAB_NAME).stat().st_blocks == 0
    finally:
        shutil.rmtree(shm)


def test_a_file_system_without_direct_io_works_too() -> None:
    shm = Path("/dev/shm") / f"xllm-test-{os.getpid()}"
    try:
        slab = open_slab(shm)
        slab.write([write_of(1, 0)])
        check_contents(slab, {1})
        slab.close()
    finally:
        shutil.rmtree(shm)


def test_a_hundred_thousand_slots_are_indexed_in_two_seconds(tmp_path: Path) -> None:
    num_slots = 100_000
    slab = SlabFile(tmp_path, SlabGeometry(num_slots, 100), ROOT)
    headers = b"".join(
        encode_header(SlotRecord(i, i + 1, name(i), name(i - 1), b"s" * 16), 100)
        for i in range(num_slots)
    )
    with open(slab.path, "r+b") as file:
        file.seek(slab.geometry.header_offset(0))
        file.write(headers)
    slab.close()
    started = time.perf_counter()
    slab = SlabFile(tmp_path, SlabGeometry(num_slots, 100), ROOT)
    assert len(slab.scan()) == num_slots
    assert time.perf_counter() - started < 2
    slab.close()


def test_aligned_buffers_are() -> None:
    assert is_aligned(aligned_buffer(8192))
    assert not is_aligned(aligned_buffer(8192)[64:])
    assert not is_aligned(aligned_buffer(5000))


def test_adjacent_runs() -> None:
    assert adjacent_runs([]) == []
    assert adjacent_runs([3]) == [slice(0, 1)]
    assert adjacent_runs([1, 2, 4, 5, 6, 9]) == [slice(0, 2), slice(2, 5), slice(5, 6)]


def test_a_sequence_that_no_slab_reaches_is_a_miss(tmp_path: Path) -> None:
    """Or the next one could not be written."""
    slab = open_slab(tmp_path)
    slab.write([write_of(0, 0, sequence=2**64 - 1), write_of(1, 1, sequence=2**63 - 1)])
    assert [record.slot for record in slab.scan()] == [1]
    slab.forget_before(2**64 - 1)
    slab.close()
    slab = open_slab(tmp_path)
    assert slab.first_sequence == 1, "made anew"
    slab.close()
