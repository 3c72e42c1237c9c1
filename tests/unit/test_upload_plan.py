"""What a worker writes, replayed into a view, against what it holds."""

from __future__ import annotations

import math
import random
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm.cache import event_codec as codec
from xllm.cache import upload_plan
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode
from xllm.cache.index import CacheIndex
from xllm.cache.upload_budget import BURST_S, Share
from xllm.cache.upload_plan import Failure, UploadPlan, Write
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue
from xllm.protocol import BlockHash, Epoch, WorkerId
from xllm.roles.index_view import IndexView

DEVICE, HOST, DISK, _ = TierCode
WIDE = Share(puts_per_s=1000, bytes_per_s=1e7)
KEYS = Keys("t")
WORKER = WorkerId("w:1")


def name(i: int) -> BlockHash:
    return BlockHash(sha256(str(i).encode()).digest()[:16])


def short(*numbers: int) -> tuple[int, ...]:
    return tuple(codec.short_hash(name(i)) for i in numbers)


def stored(*numbers: int) -> list[BlockEvent]:
    return [BlockEvent(BlockEventKind.STORED, name(i)) for i in numbers]


def removed(*numbers: int) -> list[BlockEvent]:
    return [BlockEvent(BlockEventKind.REMOVED, name(i)) for i in numbers]


CLEARED = [BlockEvent(BlockEventKind.CLEARED)]


def make_plan(share: Share = WIDE) -> UploadPlan:
    """In an epoch, whose empty snapshot is written."""
    plan = UploadPlan(share, random.Random(1))
    plan.begin_epoch(0.0)
    assert send(plan, 0.0) is not None
    return plan


def send(plan: UploadPlan, now: float) -> Write | None:
    write = plan.take(now)
    if write is not None:
        plan.written(now)
    plan.check_invariants()
    return write


def delta(write: Write | None) -> EventBatch:
    assert write is not None
    ((key, value),) = write.puts
    assert key.startswith("d/")
    return codec.decode_delta(value)


def test_a_batch_leaves_50_ms_after_its_first_event() -> None:
    plan = make_plan()
    plan.record(DEVICE, stored(1), 10.0)
    plan.record(DEVICE, stored(2), 10.04)
    assert plan.due_at(10.04) == pytest.approx(10.05)
    assert send(plan, 10.049) is None
    batch = delta(send(plan, 10.05))
    assert batch.sections == (Section(DEVICE, BlockEventKind.STORED, short(1, 2)),)
    assert plan.due_at(20.0) == math.inf


def test_what_comes_and_goes_between_two_batches_is_not_told() -> None:
    plan = make_plan()
    plan.record(DEVICE, stored(1, 2) + removed(1), 0.0)
    assert delta(send(plan, 1.0)).sections == (Section(DEVICE, BlockEventKind.STORED, short(2)),)
    plan.record(DEVICE, removed(2) + stored(2), 1.0)
    assert send(plan, 2.0) is None
    plan.record(DEVICE, stored(3) + removed(3), 2.0)
    assert send(plan, 3.0) is None
    assert plan.due_at(3.0) == math.inf


def test_cleared_says_so_once_and_only_what_came_after() -> None:
    plan = make_plan()
    plan.record(DEVICE, stored(1, 2), 0.0)
    send(plan, 1.0)
    plan.record(DEVICE, stored(3) + CLEARED + stored(2) + CLEARED + stored(4), 1.0)
    assert delta(send(plan, 2.0)).sections == (
        Section(DEVICE, BlockEventKind.CLEARED),
        Section(DEVICE, BlockEventKind.STORED, short(4)),
    )


def test_a_small_share_makes_batches_wait_and_grow() -> None:
    plan = make_plan(Share(puts_per_s=0.5, bytes_per_s=1e6))
    now, batches = 0.0, []
    for i in range(1000):
        now = i * 0.1
        plan.record(DEVICE, stored(i), now)
        if (write := send(plan, now)) is not None:
            batches.append(delta(write).num_blocks)
    assert len(batches) <= 0.5 * (now + BURST_S)
    assert sum(batches) >= 1000 - 21


def test_bytes_are_within_the_share_and_what_has_no_room_waits() -> None:
    share = Share(puts_per_s=100, bytes_per_s=1000)
    plan = make_plan(share)
    plan.record(DEVICE, stored(*range(4_000)), 0.0)
    now, num_bytes = 0.0, 0
    while (due := plan.due_at(now)) < math.inf:
        now = due
        write = send(plan, now)
        assert write is not None
        num_bytes += write.num_bytes
        assert num_bytes <= share.bytes_per_s * (now + BURST_S) + upload_plan.MAX_DELTA_BYTES
    assert plan.statistics().num_published == 4_000


def test_removals_go_first_then_what_is_used_most() -> None:
    plan = make_plan(Share(puts_per_s=100, bytes_per_s=200))
    plan.record(DEVICE, stored(0), 0.0)
    send(plan, 10.0)
    plan.record(DEVICE, stored(*range(1, 1000)) + removed(0), 10.0)
    plan.touch(short(998, 999))
    gone, came = delta(send(plan, 20.0)).sections
    assert (gone.kind, tuple(gone.hashes)) == (BlockEventKind.REMOVED, short(0))
    assert tuple(came.hashes[:3]) == short(998, 999, 1)
    assert len(came.hashes) < 200


def test_the_hottest_blocks_are_chosen_anew_when_not_all_may_be_published() -> None:
    plan = UploadPlan(Share(puts_per_s=1e4, bytes_per_s=1e8, max_blocks=10), random.Random(1))
    world = World(plan)
    plan.begin_epoch(0.0)
    world.run(0.0)
    plan.record(DEVICE, stored(*range(30)), 0.0)
    world.run(1.0)
    assert plan.statistics().num_published == 10
    plan.touch(short(*range(20, 25)))
    for i in range(upload_plan.FOLD_MAX_DELTAS + 1):
        plan.record(DEVICE, removed(0) if i % 2 else stored(0), 1.0 + i)
        world.run(1.9 + i)
    assert plan.statistics().num_published <= 10
    hottest = short(20, 21, 22, 23, 24)
    assert all(world.index.holders(block) for block in hottest)


def test_a_failed_write_goes_again_under_the_same_key_and_alone() -> None:
    plan = make_plan()
    plan.record(DEVICE, stored(1), 0.0)
    first = plan.take(1.0)
    plan.record(DEVICE, stored(2), 1.0)
    assert plan.take(2.0) is None
    plan.failed(Failure.UNAVAILABLE, 2.0)
    assert 2.0 < plan.due_at(2.0) <= 2.0 + upload_plan.RETRY_S[0]
    assert send(plan, 3.0) is first
    # Everybody else has found etcd again, too.
    assert 3.0 < plan.due_at(3.0) <= 3.0 + upload_plan.OUTAGE_JITTER_S
    assert delta(send(plan, 6.0)).sections[0].hashes == short(2)


def test_a_full_etcd_is_tried_again_seldom() -> None:
    plan = make_plan()
    plan.record(DEVICE, stored(1), 0.0)
    now = 0.0
    for _ in range(3):
        now = plan.due_at(now)
        assert plan.take(now) is not None
        plan.failed(Failure.NO_SPACE, now)
        assert plan.due_at(now) >= now + upload_plan.NO_SPACE_RETRY_S / 2


def test_a_fenced_plan_writes_nothing_until_a_new_epoch_which_begins_with_everything() -> None:
    plan = make_plan()
    plan.record(DEVICE, stored(1), 0.0)
    plan.take(1.0)
    plan.fenced()
    plan.record(DISK, stored(2), 1.0)
    assert plan.due_at(100.0) == math.inf
    plan.begin_epoch(100.0, after_outage=True)
    assert 100.0 <= plan.due_at(100.0) <= 100.0 + upload_plan.OUTAGE_JITTER_S
    writes = [send(plan, 110.0 + i) for i in range(4)]
    keys = [write.puts[0][0] for write in writes if write is not None]
    assert [key.split("/")[0] for key in keys] == ["s", "s", "head"]
    assert writes[3] is None


def test_deltas_fold_into_a_snapshot_while_new_ones_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload_plan, "FOLD_MIN_BYTES", 64)
    monkeypatch.setattr(upload_plan, "MIN_CHUNK_BYTES", 64)
    monkeypatch.setattr(upload_plan, "MAX_CHUNK_BYTES", 64)
    plan = make_plan()
    kinds = []
    for i in range(60):
        now = float(i)
        plan.record(DEVICE, stored(i % 40) if i % 3 else removed((i - 20) % 40), now)
        while plan.due_at(now + 0.5) <= now + 0.5:
            write = send(plan, now + 0.5)
            assert write is not None
            kinds.append(write.puts[0][0][0])
            if kinds[-1] == "s":
                plan.record(HOST, stored(len(kinds)), now)
    assert "sdsd" in "".join(kinds)
    assert "h" in kinds


class World:
    """A plan, an etcd that may lose answers, and a master that reads it all, some things twice."""

    def __init__(self, plan: UploadPlan) -> None:
        self.plan = plan
        self.epoch = Epoch(7)
        self.revision = 1
        self.index = CacheIndex()
        self.view = IndexView(KEYS, self.index)
        self.put(KEYS.worker(WORKER), b"{}")

    def put(self, key: str, value: bytes) -> None:
        self.revision += 1
        kv = KeyValue(key, value, self.revision, self.revision, self.epoch)
        self.view.feed([Change(PUT, kv)])
        self.view.work()

    def apply(self, write: Write) -> None:
        folder = KEYS.cache_of(WORKER, self.epoch)
        for key, value in write.puts:
            self.put(folder + key, value)
        for first, _ in write.deletes:
            self.view.feed([Change(DELETE, KeyValue(folder + first, b"", 0, self.revision, 0))])

    def run(self, until: float) -> None:
        """Writes all that is due."""
        while (write := self.plan.take(until)) is not None:
            self.apply(write)
            self.plan.written(until)
        self.view.work()


class UploadMachine(RuleBasedStateMachine):
    numbers = st.lists(st.integers(0, 20), max_size=8)
    tiers = st.sampled_from([DEVICE, HOST])

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.held: dict[TierCode, set[int]] = {tier: set() for tier in TierCode}
        self.plan = UploadPlan(Share(puts_per_s=50, bytes_per_s=4000), random.Random(2))
        self.world = World(self.plan)
        self.plan.begin_epoch(0.0)

    @rule(tier=tiers, numbers=numbers)
    def store(self, tier: TierCode, numbers: list[int]) -> None:
        fresh = list(dict.fromkeys(n for n in numbers if n not in self.held[tier]))
        self.plan.record(tier, stored(*fresh), self.now)
        self.held[tier].update(fresh)

    @rule(tier=tiers, numbers=numbers)
    def remove(self, tier: TierCode, numbers: list[int]) -> None:
        gone = list(dict.fromkeys(n for n in numbers if n in self.held[tier]))
        self.plan.record(tier, removed(*gone), self.now)
        self.held[tier].difference_update(gone)

    @rule(tier=tiers)
    def clear(self, tier: TierCode) -> None:
        self.plan.record(tier, CLEARED, self.now)
        self.held[tier].clear()

    @rule(seconds=st.sampled_from([0.01, 0.06, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(arrives=st.booleans(), answered=st.booleans())
    def write(self, arrives: bool, answered: bool) -> None:
        write = self.plan.take(self.now)
        if write is None:
            return
        if arrives or answered:
            self.world.apply(write)
        if answered:
            self.plan.written(self.now)
        else:
            self.plan.failed(Failure.UNAVAILABLE, self.now)

    @rule()
    def lose_the_lease(self) -> None:
        self.plan.fenced()
        self.plan.begin_epoch(self.now, after_outage=True)
        self.world.epoch = Epoch(self.world.epoch + 1)
        self.world.put(KEYS.worker(WORKER), b"{}")

    @rule()
    def settle(self) -> None:
        for _ in range(100):
            self.now += 1.0
            self.world.run(self.now)
        for tier, held in self.held.items():
            for number in range(21):
                known = (WORKER, tier) in self.world.index.holders(*short(number))
                assert known == (number in held)

    @invariant()
    def is_consistent(self) -> None:
        self.plan.check_invariants()
        self.world.index.check_invariants()


TestUploadMachine = UploadMachine.TestCase
TestUploadMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
