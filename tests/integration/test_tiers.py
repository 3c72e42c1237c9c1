"""Host and disk tiers, mover and bookkeeping together, on a real disk.

`TiersMachine` decides itself when each transfer begins, runs and is seen to have ended, so every
interleaving with evictions, cancellations, deadlines, clears and faults can happen.
"""

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xllm.cache.block_pool import BlockEventKind
from xllm.cache.disk_tier import DiskTier, DiskTierConfig, cache_directory
from xllm.cache.eviction import EvictionPolicyName
from xllm.cache.host_tier import HostMemoryBlocks, HostTier
from xllm.cache.loads import BlockSource, LoadTicket
from xllm.cache.mover import Mover, Transfer
from xllm.cache.slab import SLAB_NAME, aligned_buffer
from xllm.cache.slab_format import Buffer, SlabGeometry
from xllm.cache.stores import DiskWritePolicy
from xllm.cache.tier import Lookup, TierName
from xllm.cache.tiers import Tiers
from xllm.protocol import BlockHash

BLOCK_BYTES = 4096
ROOT = BlockHash(b"r" * 16)


def name(i: int) -> BlockHash:
    return BlockHash(sha256(str(i).encode()).digest()[:16])


def content(i: int) -> Buffer:
    return np.random.default_rng(i).integers(0, 256, BLOCK_BYTES, dtype=np.uint8)


class FaultyIO:
    """The system's calls, until `error` is set."""

    def __init__(self) -> None:
        self.error = 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._fail()
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._fail()
        return os.pwritev(fd, buffers, offset)

    def _fail(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


class UnaddressableBlocks(HostMemoryBlocks):
    """As a GPU's: only copies reach them."""

    def view(self, block_id: int) -> None:  # type: ignore[override]
        return None


class Rig:
    """Tiers over a device of plain memory, a clock of their own and, mostly, no threads."""

    def __init__(
        self,
        directory: Path,
        *,
        num_blocks: int = 12,
        host_slots: int = 6,
        disk_slots: int = 8,
        policy: DiskWritePolicy = DiskWritePolicy.WRITE_THROUGH,
        num_threads: int = 0,
        addressable: bool = True,
    ) -> None:
        self.now = 0.0
        self.io = FaultyIO()
        memory = aligned_buffer(num_blocks * BLOCK_BYTES).reshape(num_blocks, BLOCK_BYTES)
        self.device = (HostMemoryBlocks if addressable else UnaddressableBlocks)(memory)
        self.blocks = memory
        self.woken = threading.Event()
        self.mover = Mover(num_threads, on_ended=self.woken.set)
        self.cold: list[BlockHash] = []
        geometry = SlabGeometry(disk_slots, BLOCK_BYTES)
        self.config = DiskTierConfig(
            directory=cache_directory(directory, ROOT),
            size_bytes=geometry.file_bytes + (72 << 10),
            block_bytes=BLOCK_BYTES,
            root=ROOT,
            eviction_policy=EvictionPolicyName.LRU,
        )
        host = None
        if host_slots:
            host = HostTier(
                host_slots,
                BLOCK_BYTES,
                eviction_policy=EvictionPolicyName.GRADED,
                clock=lambda: self.now,
            )
        disk = DiskTier(self.config, clock=lambda: self.now, io=self.io) if disk_slots else None
        self.tiers = Tiers(
            self.device,
            self.mover,
            host=host,
            disk=disk,
            disk_write_policy=policy,
            clock=lambda: self.now,
            cold_device_blocks=lambda limit: self.cold[:limit],
        )

    def compute(self, i: int, block_id: int, parent: int | None = None) -> None:
        self.blocks[block_id] = content(i)
        self.tiers.committed(name(i), None if parent is None else name(parent), block_id)

    def evict(self, i: int, block_id: int) -> None:
        self.tiers.evicted(name(i), block_id)
        self.blocks[block_id] = 0

    def run_one(self) -> bool:
        transfer = self.mover.take_work()
        if transfer is not None:
            self.mover.run(transfer)
        return transfer is not None

    def settle(self) -> list[LoadTicket]:
        """Runs everything there is to run."""
        done = self.tiers.poll()
        while self.run_one():
            done += self.tiers.poll()
        return done + self.tiers.poll()

    def wait(self) -> list[LoadTicket]:
        """As `settle`, with the mover's own threads."""
        done = self.tiers.poll()
        while not self.tiers.is_idle:
            assert self.woken.wait(30)
            self.woken.clear()
            done += self.tiers.poll()
        return done

    def match(self, ids: Sequence[int], block_compute_s: float | None = None) -> list[TierName]:
        sources = self.tiers.match([name(i) for i in ids], block_compute_s)
        return [source.tier for source in sources]

    def load(self, ids: Sequence[int], block_ids: Sequence[int]) -> LoadTicket:
        hashes = [name(i) for i in ids]
        found = self.tiers.match(hashes)
        blocks = list(zip(hashes, found, block_ids, strict=False))
        return self.tiers.start_load(blocks, timeout_s=10.0)

    def check_loaded(
        self, ticket: LoadTicket, ids: Sequence[int], block_ids: Sequence[int]
    ) -> None:
        assert ticket.is_done
        assert ticket.num_arrived == len(ids)
        for i, block_id in zip(ids, block_ids, strict=True):
            assert np.array_equal(self.blocks[block_id], content(i))


@pytest.mark.parametrize("addressable", [True, False])
@pytest.mark.parametrize("host_slots", [0, 6])
def test_blocks_come_back_from_the_tier_they_went_to(
    tmp_path: Path, host_slots: int, addressable: bool
) -> None:
    rig = Rig(tmp_path, host_slots=host_slots, addressable=addressable)
    for i in range(4):
        rig.compute(i, i, i - 1 if i else None)
    rig.settle()
    for i in range(4):
        rig.evict(i, i)
    expected = TierName.HOST if host_slots else TierName.DISK
    assert rig.match(range(6)) == [expected] * 4
    ticket = rig.load(range(6), range(6))
    assert not ticket.is_done
    assert rig.settle() == [ticket]
    rig.check_loaded(ticket, range(4), range(4))
    assert ticket.tiers == [expected] * 4
    rig.tiers.close()


def test_disk_survives_a_restart_and_a_clear_does_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for i in range(4):
        rig.compute(i, i)
    rig.settle()
    rig.tiers.close()
    rig = Rig(tmp_path)
    assert rig.match(range(6)) == [TierName.DISK] * 4
    kinds = {(tier, e.kind) for tier, events in rig.tiers.take_events() for e in events}
    assert kinds == {(TierName.DISK, BlockEventKind.STORED)}
    ticket = rig.load(range(4), range(4))
    rig.settle()
    rig.check_loaded(ticket, range(4), range(4))
    assert rig.tiers.clear(TierName.DISK) == 4
    rig.settle()
    rig.tiers.close()
    rig = Rig(tmp_path)
    assert rig.match([0]) == []
    rig.tiers.close()


def test_selective_writes_admit_a_block_at_its_second_use(tmp_path: Path) -> None:
    rig = Rig(tmp_path, host_slots=0, policy=DiskWritePolicy.WRITE_THROUGH_SELECTIVE)
    rig.compute(0, 0)
    rig.compute(1, 1)
    rig.settle()
    assert rig.tiers.disk is not None
    assert rig.tiers.disk.table is not None
    assert rig.tiers.disk.table.lookup(name(0)) is Lookup.MISS
    rig.tiers.used([name(0)])
    rig.evict(1, 1)
    rig.compute(1, 2)
    rig.settle()
    assert rig.tiers.disk.table.lookup(name(0)) is Lookup.HIT, "used again"
    assert rig.tiers.disk.table.lookup(name(1)) is Lookup.HIT, "computed again"
    rig.tiers.close()


def test_write_back_writes_what_the_host_is_about_to_evict(tmp_path: Path) -> None:
    rig = Rig(tmp_path, host_slots=40, num_blocks=20, policy=DiskWritePolicy.WRITE_BACK)
    for i in range(8):
        rig.compute(i, i)
    rig.settle()
    assert rig.tiers.statistics().stores.num_to_disk == 0
    rig.compute(8, 8)
    rig.settle()
    assert rig.tiers.statistics().stores.num_to_disk > 0
    rig.tiers.close(0.0)


def test_write_back_without_a_host_tier_writes_what_the_device_is_about_to_evict(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, host_slots=0, policy=DiskWritePolicy.WRITE_BACK)
    for i in range(4):
        rig.compute(i, i)
    rig.cold = [name(2), name(1)]
    rig.settle()
    assert rig.match([2]) == rig.match([1]) == [TierName.DISK]
    assert rig.match([0]) == []
    rig.tiers.close(0.0)


def test_a_block_evicted_while_it_is_copied_is_stored_nowhere(tmp_path: Path) -> None:
    for host_slots in (0, 6):
        rig = Rig(tmp_path, host_slots=host_slots)
        rig.compute(0, 0)
        rig.compute(1, 1)
        rig.tiers.poll()
        rig.run_one()
        rig.evict(0, 0)
        rig.settle()
        assert rig.match([0]) == []
        assert len(rig.match([1])) == 1
        assert rig.tiers.statistics().stores.num_torn == 1
        rig.tiers.check_invariants()
        rig.tiers.close()
        shutil.rmtree(tmp_path)


def test_a_timed_out_load_keeps_its_blocks_until_the_transfer_has_ended(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for i in range(3):
        rig.compute(i, i)
    rig.settle()
    ticket = rig.load(range(3), [9, 10, 11])
    transfer = rig.mover.take_work()
    assert transfer is not None
    assert rig.tiers.next_deadline == 10.0
    rig.now = 10.0
    assert rig.tiers.poll() == [ticket]
    assert ticket.num_arrived == 0
    assert ticket.busy_block_ids == [9, 10, 11]
    assert rig.tiers.take_returned_blocks() == []
    assert rig.tiers.statistics().tables[TierName.HOST].num_pinned == 3
    rig.mover.run(transfer)
    assert rig.settle() == []
    assert rig.tiers.take_returned_blocks() == [9, 10, 11]
    assert rig.tiers.statistics().tables[TierName.HOST].num_pinned == 0
    assert rig.tiers.statistics().loads.num_timeouts == 1
    rig.tiers.close()


def test_a_cancelled_load_gives_back_what_was_not_begun(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.compute(0, 0)
    rig.settle()
    ticket = rig.load([0], [5])
    rig.tiers.cancel(ticket)
    assert ticket.is_done
    assert ticket.busy_block_ids == []
    assert ticket.num_arrived == 0
    rig.tiers.cancel(ticket)
    assert rig.settle() == []
    assert rig.tiers.statistics().tables[TierName.HOST].num_pinned == 0
    rig.tiers.close()


def test_a_load_of_what_has_gone_is_done_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    gone = [(name(0), BlockSource(TierName.HOST), 3), (name(1), BlockSource(TierName.DISK), 4)]
    ticket = rig.tiers.start_load(gone, timeout_s=1.0)
    assert ticket.is_done
    assert rig.tiers.poll() == [ticket]
    assert (ticket.num_arrived, ticket.busy_block_ids) == (0, [])
    cancelled = rig.tiers.start_load(gone, timeout_s=1.0)
    rig.tiers.cancel(cancelled)
    assert rig.tiers.poll() == []
    rig.tiers.close()


def test_a_block_that_ends_before_its_ticket_is_seen_is_not_given_back_twice(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.compute(0, 0)
    rig.settle()
    rig.compute(1, 1)
    rig.settle()
    assert rig.tiers.host is not None
    rig.tiers.host.table.discard(name(1))
    found = rig.match([0, 1])
    assert found == [TierName.HOST, TierName.DISK]
    ticket = rig.load([0, 1], [8, 9])
    rig.tiers.host.slot(0)[0] ^= 1
    while rig.run_one():
        pass
    assert rig.tiers.poll() == [ticket], "both transfers end in one poll, the first has failed"
    assert (ticket.num_arrived, ticket.busy_block_ids) == (0, [])
    assert rig.tiers.take_returned_blocks() == []
    rig.tiers.close()


@pytest.mark.parametrize("tier", [TierName.HOST, TierName.DISK])
def test_a_flipped_bit_ends_the_prefix_and_drops_the_block(tmp_path: Path, tier: TierName) -> None:
    rig = Rig(tmp_path, host_slots=6 if tier is TierName.HOST else 0)
    for i in range(3):
        rig.compute(i, i)
    rig.settle()
    if rig.tiers.host is not None:
        for slot in range(6):
            if np.array_equal(rig.tiers.host.slot(slot), content(1)):
                rig.tiers.host.slot(slot)[7] ^= 4
    else:
        path = rig.config.directory / SLAB_NAME
        raw = path.read_bytes()
        offset = raw.index(content(1).tobytes())
        with open(path, "r+b") as file:
            file.seek(offset + 7)
            file.write(bytes([raw[offset + 7] ^ 4]))
    ticket = rig.load(range(3), [9, 10, 11])
    rig.settle()
    assert ticket.num_arrived == 1
    rig.check_loaded(ticket, [0], [9])
    assert rig.tiers.statistics().loads.num_corrupt == 1
    lower = rig.match([1])
    assert lower == ([TierName.DISK] if tier is TierName.HOST else [])
    rig.tiers.close()


def test_a_failing_disk_detaches_and_comes_back_with_what_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, host_slots=0)
    for i in range(3):
        rig.compute(i, i)
    rig.settle()
    rig.tiers.take_events()
    rig.io.error = 5
    ticket = rig.load(range(3), [9, 10, 11])
    assert rig.settle() == [ticket]
    assert ticket.num_arrived == 0
    assert rig.match([0]) == []
    [(_, events)] = rig.tiers.take_events()
    assert [event.kind for event in events] == [BlockEventKind.CLEARED]
    assert "disk_tier_detached" in caplog.text
    assert rig.tiers.statistics().num_detachments == 1
    rig.compute(5, 5)
    for attempt in range(3):
        rig.now += 2.0**attempt
        rig.settle()
        assert rig.match([0]) == []
    rig.io.error = 0
    rig.settle()
    assert rig.match([0]) == [], "not before its time"
    rig.now += 8.0
    rig.settle()
    assert rig.match(range(4)) == [TierName.DISK] * 3
    assert rig.tiers.statistics().num_detachments == 1
    ticket = rig.load(range(3), [9, 10, 11])
    rig.settle()
    rig.check_loaded(ticket, range(3), [9, 10, 11])
    rig.tiers.close()


def test_a_removed_directory_is_made_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path, host_slots=0)
    rig.compute(0, 0)
    rig.settle()
    shutil.rmtree(rig.config.directory)
    ticket = rig.load([0], [9])
    rig.settle()
    assert ticket.num_arrived == 0
    rig.now += 1.0
    rig.settle()
    assert rig.match([0]) == []
    rig.evict(0, 0)
    rig.compute(0, 0)
    rig.settle()
    assert rig.match([0]) == [TierName.DISK]
    rig.tiers.close()


def test_a_tier_slower_than_computing_is_not_read_for_a_while(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.compute(0, 0)
    rig.settle()
    ticket = rig.load([0], [9])
    rig.now += 2.0
    rig.settle()
    assert ticket.num_arrived == 1
    assert rig.tiers.statistics().bytes_per_s[TierName.HOST] == BLOCK_BYTES / 2
    assert rig.match([0], block_compute_s=3.0) == [TierName.HOST]
    assert rig.match([0], block_compute_s=1.0) == [TierName.DISK]
    rig.now += 60.0
    assert rig.match([0], block_compute_s=1.0) == [TierName.HOST]
    rig.tiers.close()


def test_threads_move_many_blocks_and_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_blocks=200, host_slots=100, disk_slots=100, num_threads=4)
    for i in range(100):
        rig.compute(i, i, i - 1 if i else None)
    rig.wait()
    statistics = rig.tiers.statistics()
    assert statistics.stores.num_to_host == statistics.stores.num_to_disk == 100
    assert rig.tiers.clear(TierName.HOST) == 100
    ticket = rig.load(range(100), range(100, 200))
    assert rig.wait() == [ticket]
    rig.check_loaded(ticket, range(100), range(100, 200))
    assert ticket.tiers == [TierName.DISK] * 100
    rig.tiers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("mover-")]


NUM_BLOCKS = 8
NUM_IDS = 6
PICKS = st.integers(0, 99)
"""Chooses one of however many there are."""


class TiersMachine(RuleBasedStateMachine):
    """A naive device cache over the tiers; block i of a chain has i - 1 as its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.running: list[Transfer] = []
        self.free: set[int] = set(range(NUM_BLOCKS))
        self.named: dict[int, int] = {}
        """Block id -> i."""
        self.loading: dict[LoadTicket, tuple[list[int], list[int]]] = {}
        self.busy: set[int] = set()
        self.index: dict[TierName, set[BlockHash]] = {TierName.HOST: set(), TierName.DISK: set()}
        """As an outsider knows it from the events."""
        self.happened: Counter[str] = Counter()

    @initialize(
        policy=st.sampled_from(DiskWritePolicy),
        host_slots=st.sampled_from([0, 4]),
        disk_slots=st.sampled_from([0, 5]),
        addressable=st.booleans(),
    )
    def build(
        self, policy: DiskWritePolicy, host_slots: int, disk_slots: int, addressable: bool
    ) -> None:
        self.kinds = {"policy": policy, "host_slots": host_slots, "disk_slots": disk_slots}
        self.addressable = addressable
        self.rig = self.make_rig()

    def make_rig(self) -> Rig:
        return Rig(
            self.directory,
            num_blocks=NUM_BLOCKS,
            addressable=self.addressable,
            **self.kinds,  # type: ignore[arg-type]
        )

    @rule(length=st.integers(1, NUM_IDS))
    def compute(self, length: int) -> None:
        """A chain is computed, but for what is there already and what finds no room."""
        for i in range(length):
            if self.free and i not in self.named.values():
                block_id = min(self.free)
                self.free.remove(block_id)
                self.named[block_id] = i
                self.rig.compute(i, block_id, i - 1 if i else None)

    @rule(pick=PICKS, limit=st.integers(1, NUM_BLOCKS))
    def evict(self, pick: int, limit: int) -> None:
        for _ in range(min(limit, len(self.named))):
            block_id = sorted(self.named)[pick % len(self.named)]
            self.rig.evict(self.named.pop(block_id), block_id)
            self.free.add(block_id)

    @rule()
    def clear_device(self) -> None:
        self.rig.tiers.cleared()
        for block_id in self.named:
            self.rig.blocks[block_id] = 0
            self.free.add(block_id)
        self.named.clear()

    @rule(tier=st.sampled_from([TierName.HOST, TierName.DISK]))
    def clear_tier(self, tier: TierName) -> None:
        self.rig.tiers.clear(tier)

    @rule(length=st.integers(1, NUM_IDS))
    def use(self, length: int) -> None:
        self.rig.tiers.used([name(i) for i in range(length)])

    @rule(start=st.integers(0, 2))
    def load(self, start: int) -> None:
        ids = list(range(start, NUM_IDS))
        found = self.rig.tiers.match([name(i) for i in ids])[: len(self.free)]
        if not found:
            return
        block_ids = sorted(self.free)[: len(found)]
        self.free.difference_update(block_ids)
        blocks = [(name(i), t, b) for i, t, b in zip(ids, found, block_ids, strict=False)]
        ticket = self.rig.tiers.start_load(blocks, timeout_s=5.0)
        self.loading[ticket] = (ids[: len(found)], block_ids)

    @precondition(lambda self: self.loading)
    @rule(pick=PICKS)
    def cancel(self, pick: int) -> None:
        ticket = list(self.loading)[pick % len(self.loading)]
        self.rig.tiers.cancel(ticket)
        self.finish(ticket)

    @rule(num_transfers=st.integers(1, 8))
    def advance(self, num_transfers: int) -> None:
        """What usually happens: transfers are run and seen in the order in which they began."""
        for _ in range(num_transfers):
            if not self.rig.run_one():
                break
            self.poll()

    @rule()
    def begin_transfer(self) -> None:
        transfer = self.rig.mover.take_work()
        if transfer is not None:
            self.running.append(transfer)

    @precondition(lambda self: self.running)
    @rule(pick=PICKS)
    def end_transfer(self, pick: int) -> None:
        self.rig.mover.run(self.running.pop(pick % len(self.running)))

    @rule()
    def poll(self) -> None:
        self.rig.cold = [name(i) for i in self.named.values()]
        for ticket in self.rig.tiers.poll():
            if not ticket.busy_block_ids or ticket in self.loading:
                self.finish(ticket)
        for block_id in self.rig.tiers.take_returned_blocks():
            self.busy.remove(block_id)
            self.free.add(block_id)

    def finish(self, ticket: LoadTicket) -> None:
        assert ticket.is_done
        ids, block_ids = self.loading.pop(ticket)
        busy = set(ticket.busy_block_ids)
        self.busy |= busy
        self.happened["arrived"] += ticket.num_arrived
        for position, (i, block_id) in enumerate(zip(ids, block_ids, strict=True)):
            if position < ticket.num_arrived:
                assert block_id not in busy
                assert np.array_equal(self.rig.blocks[block_id], content(i))
                if i not in self.named.values():
                    self.named[block_id] = i
                    self.rig.tiers.committed(name(i), name(i - 1) if i else None, block_id)
                    continue
            if block_id not in busy:
                self.free.add(block_id)

    @rule(seconds=st.sampled_from([0.5, 3.0, 70.0]))
    def pass_time(self, seconds: float) -> None:
        self.rig.now += seconds

    @rule(slot=st.integers(0, 3))
    def flip_host_bit(self, slot: int) -> None:
        host = self.rig.tiers.host
        if host is not None:
            host.slot(slot)[100] ^= 1

    @rule(slot=st.integers(0, 4), in_header=st.booleans())
    def flip_disk_bit(self, slot: int, in_header: bool) -> None:
        if not self.kinds["disk_slots"]:
            return
        geometry = self.rig.config.geometry
        offset = geometry.header_offset(slot) if in_header else geometry.payload_offset(slot)
        with open(self.rig.config.directory / SLAB_NAME, "r+b") as file:
            file.seek(offset + 40)
            (byte,) = file.read(1)
            file.seek(offset + 40)
            file.write(bytes([byte ^ 1]))

    @rule(error=st.sampled_from([0, 0, 5, 28, 30]))
    def set_disk_error(self, error: int) -> None:
        self.rig.io.error = error

    @rule()
    def restart(self) -> None:
        """A clean stop; what is on the device and in the host is gone."""
        self.drain()
        self.rig.io.error = 0
        self.close()
        self.rig = self.make_rig()
        self.free, self.named = set(range(NUM_BLOCKS)), {}
        self.index = {TierName.HOST: set(), TierName.DISK: set()}

    def close(self) -> None:
        statistics = self.rig.tiers.statistics()
        self.happened["torn"] += statistics.stores.num_torn
        self.happened["timeouts"] += statistics.loads.num_timeouts
        self.happened["corrupt"] += statistics.loads.num_corrupt
        self.rig.tiers.close(0.0)

    def drain(self) -> None:
        """Lets everything end: nothing is pinned, reserved or busy any more."""
        for ticket in list(self.loading):
            self.rig.tiers.cancel(ticket)
            self.finish(ticket)
        while self.running:
            self.rig.mover.run(self.running.pop())
        while True:
            self.poll()
            if not self.rig.run_one():
                break
        self.poll()
        assert self.rig.tiers.is_idle
        assert not self.busy
        assert self.free | set(self.named) == set(range(NUM_BLOCKS))
        for table in self.rig.tiers.statistics().tables.values():
            assert table.num_reserved == table.num_pinned == 0

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "rig"):
            return
        tiers = self.rig.tiers
        tiers.check_invariants()
        held = [b for _, block_ids in self.loading.values() for b in block_ids]
        everything = [*self.free, *self.named, *held, *self.busy]
        assert sorted(everything) == list(range(NUM_BLOCKS))
        taken = [(tier, event) for tier, events in tiers.take_events() for event in events]
        for tier, event in taken:
            if event.kind is BlockEventKind.CLEARED:
                self.index[tier].clear()
            elif event.kind is BlockEventKind.STORED:
                assert event.hash is not None
                self.index[tier].add(event.hash)
            else:
                assert event.hash is not None
                self.index[tier].remove(event.hash)
        host_table = None if tiers.host is None else tiers.host.table
        disk_table = None if tiers.disk is None else tiers.disk.table
        for tier, table in ((TierName.HOST, host_table), (TierName.DISK, disk_table)):
            assert self.index[tier] == (set() if table is None else set(table.hashes()))

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.drain()
            self.close()
        shutil.rmtree(self.directory)


TestTiersMachine = TiersMachine.TestCase
TestTiersMachine.settings = settings(max_examples=25, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("seed", range(12))
def test_long_random_histories(seed: int) -> None:
    """The same rules, for as long as it takes rare things to meet: `minimum` says what has to
    have happened."""
    random = Random(seed)
    machine = TiersMachine()
    policy = list(DiskWritePolicy)[seed % 3]
    host_slots, disk_slots = [(4, 5), (0, 5), (4, 0), (4, 5)][seed // 3]
    machine.build(policy, host_slots, disk_slots, addressable=seed % 2 == 0)
    rules: list[tuple[int, Callable[[], None]]] = [
        (20, lambda: machine.compute(random.randint(1, NUM_IDS))),
        (20, lambda: machine.evict(random.randrange(99), random.randint(1, NUM_BLOCKS))),
        (12, lambda: machine.use(random.randint(1, NUM_IDS))),
        (20, lambda: machine.load(random.randint(0, 2))),
        (40, lambda: machine.advance(random.randint(1, 8))),
        (12, machine.begin_transfer),
        (12, lambda: machine.running and machine.end_transfer(random.randrange(99))),
        (20, machine.poll),
        (4, lambda: machine.loading and machine.cancel(random.randrange(99))),
        (8, lambda: machine.pass_time(random.choice([0.5, 3.0, 70.0]))),
        (1, machine.clear_device),
        (1, lambda: machine.clear_tier(random.choice([TierName.HOST, TierName.DISK]))),
        (2, lambda: machine.flip_host_bit(random.randrange(4))),
        (2, lambda: machine.flip_disk_bit(random.randrange(5), random.random() < 0.3)),
        (1, lambda: machine.set_disk_error(random.choice([5, 28, 30]))),
        (3, lambda: machine.set_disk_error(0)),
        (1, machine.restart),
    ]
    weights = [weight for weight, _ in rules]
    for _, step in random.choices(rules, weights, k=2500):
        step()
        machine.holds()
    machine.teardown()
    minimum = {"arrived": 30, "torn": 5, "timeouts": 1, "corrupt": 1}
    assert all(machine.happened[what] >= count for what, count in minimum.items()), machine.happened
