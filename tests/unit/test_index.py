"""The cache index against a model that is too simple to be wrong."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm.cache import index as index_module
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode
from xllm.cache.index import CacheIndex
from xllm.protocol import WorkerId

A, B = WorkerId("a"), WorkerId("b")
DEVICE, HOST, DISK, REMOTE = TierCode


def stored(tier: TierCode, *hashes: int) -> EventBatch:
    return EventBatch((Section(tier, BlockEventKind.STORED, hashes),))


def removed(tier: TierCode, *hashes: int) -> EventBatch:
    return EventBatch((Section(tier, BlockEventKind.REMOVED, hashes),))


def test_only_the_unbroken_prefix_counts() -> None:
    index = CacheIndex()
    index.apply(A, stored(DEVICE, 1, 2, 4))
    index.apply(B, stored(DEVICE, 2, 3, 4))
    assert index.match([1, 2, 3, 4]) == {A: [2, 0, 0, 0]}


def test_a_block_counts_in_the_fastest_tier_that_has_it() -> None:
    index = CacheIndex()
    index.apply(A, stored(HOST, 1, 2, 3))
    index.apply(A, stored(DEVICE, 2))
    index.apply(A, stored(DISK, 3, 4))
    assert index.match([1, 2, 3, 4, 5, 6]) == {A: [1, 2, 1, 0]}
    index.apply(A, removed(DEVICE, 2))
    assert index.match([1, 2, 3, 4, 5, 6]) == {A: [0, 3, 1, 0]}


def test_what_is_in_the_shared_store_is_nobodys_and_known_by_all() -> None:
    index = CacheIndex()
    assert index.store_gaps([1, 2]) is None
    index.apply(A, stored(DEVICE, 1))
    index.apply(A, stored(REMOTE, 1, 2))
    index.apply(B, stored(REMOTE, 2, 4))
    assert index.match([1, 2, 3, 4]) == {A: [1, 0, 0, 0]}
    assert index.match([2]) == {}
    assert index.store_gaps([1, 2, 3, 4, 5]) == [2, 4]
    index.apply(A, removed(REMOTE, 2))
    assert index.store_gaps([1, 2]) == []
    index.remove_worker(B)
    assert index.store_gaps([1, 2]) == [1]
    index.remove_worker(A)
    assert index.store_gaps([1, 2]) is None


def test_a_block_held_below_the_device_alone_is_found() -> None:
    index = CacheIndex()
    index.apply(A, stored(DISK, 1))
    assert index.match([1]) == {A: [0, 0, 1, 0]}


def test_nobody_holds_an_empty_prompt_or_an_unknown_block() -> None:
    index = CacheIndex()
    assert index.match([1]) == {}
    index.apply(A, stored(DEVICE, 1))
    assert index.match([]) == {}
    assert index.match([2, 1]) == {}


def test_events_twice_are_events_once() -> None:
    index = CacheIndex()
    for _ in range(2):
        index.apply(A, stored(DEVICE, 1, 1, 2))
    assert index.num_held(A) == [2, 0, 0, 0]
    for _ in range(2):
        index.apply(A, removed(DEVICE, 2, 3))
    assert index.num_held(A) == [1, 0, 0, 0]
    index.check_invariants()


def test_clear_empties_one_tier_of_one_worker_and_sections_hold_in_order() -> None:
    index = CacheIndex()
    index.apply(B, stored(DEVICE, 1))
    index.apply(A, stored(HOST, 1))
    cleared = Section(DEVICE, BlockEventKind.CLEARED)
    before, after = (Section(DEVICE, BlockEventKind.STORED, (block,)) for block in (1, 2))
    index.apply(A, EventBatch((before, cleared, after)))
    assert index.holders(1) == [(B, DEVICE), (A, HOST)]
    assert index.holders(2) == [(A, DEVICE)]
    index.clear(A, HOST)
    assert index.match([1]) == {B: [1, 0, 0, 0]}
    index.check_invariants()


def test_a_worker_that_leaves_is_forgotten_and_its_place_used_again() -> None:
    index = CacheIndex()
    index.apply(A, stored(DEVICE, 1, 2))
    index.apply(B, stored(DEVICE, 1))
    index.remove_worker(A)
    index.remove_worker(A)
    assert index.match([1, 2]) == {B: [1, 0, 0, 0]}
    index.apply(WorkerId("c"), stored(DEVICE, 3))
    assert index.match([3]) == {"c": [1, 0, 0, 0]}
    assert index.statistics().num_copies == 2
    index.check_invariants()


def test_work_comes_in_slices_and_a_leaving_worker_is_not_matched_in_between() -> None:
    index = CacheIndex()
    hashes = tuple(range(3 * index_module.SLICE_BLOCKS))
    held = []
    for _ in index.apply_slices(A, stored(DEVICE, *hashes)):
        held.append(index.num_held(A)[DEVICE])
        index.check_invariants()
    assert held == [index_module.SLICE_BLOCKS * i for i in (1, 2, 3)]
    slices = index.remove_worker_slices(A)
    next(slices)
    assert index.match(hashes) == {}
    index.check_invariants()
    assert len(list(slices)) == 2
    assert index.statistics().num_blocks == 0


def naive_match(
    contents: dict[WorkerId, list[set[int]]], hashes: Sequence[int]
) -> dict[WorkerId, list[int]]:
    found = {}
    for worker, tiers in contents.items():
        counts = [0, 0, 0, 0]
        for block in hashes:
            tier = next((tier for tier in (DEVICE, HOST, DISK) if block in tiers[tier]), None)
            if tier is None:
                break
            counts[tier] += 1
        if any(counts):
            found[worker] = counts
    return found


# Few shards and small bounds, so that they are met: 5 and 261 are in one shard.
blocks = st.lists(st.sampled_from([*range(8), 5 + 256, (1 << 64) - 1]), max_size=10)
workers = st.sampled_from([WorkerId(f"w{i}") for i in range(5)])
tiers = st.sampled_from(TierCode)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = CacheIndex()
        self.contents: dict[WorkerId, list[set[int]]] = {}

    @rule(worker=workers, tier=tiers, hashes=blocks)
    def store(self, worker: WorkerId, tier: TierCode, hashes: list[int]) -> None:
        self.index.apply(worker, stored(tier, *hashes))
        self.contents.setdefault(worker, [set() for _ in TierCode])[tier].update(hashes)

    @rule(worker=workers, tier=tiers, hashes=blocks)
    def remove(self, worker: WorkerId, tier: TierCode, hashes: list[int]) -> None:
        self.index.apply(worker, removed(tier, *hashes))
        self.contents.setdefault(worker, [set() for _ in TierCode])[tier] -= set(hashes)

    @rule(worker=workers, tier=tiers)
    def clear(self, worker: WorkerId, tier: TierCode) -> None:
        self.index.clear(worker, tier)
        if worker in self.contents:
            self.contents[worker][tier].clear()

    @rule(worker=workers)
    def leave(self, worker: WorkerId) -> None:
        self.index.remove_worker(worker)
        self.contents.pop(worker, None)

    @rule(hashes=blocks)
    def match(self, hashes: list[int]) -> None:
        assert self.index.match(hashes) == naive_match(self.contents, hashes)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        self.index.check_invariants()
        for worker, tiers in self.contents.items():
            assert self.index.num_held(worker) == [len(held) for held in tiers]
        assert self.index.match(range(8)) == naive_match(self.contents, range(8))
        known = set().union(*(tiers[REMOTE] for tiers in self.contents.values()))
        gaps = [block for block in range(8) if block not in known]
        assert self.index.store_gaps(range(8)) == (gaps if known else None)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
