"""Bookkeeping of a tier's slots, against a naive model."""

from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm.cache.block_pool import BlockEventKind
from xllm.cache.eviction import EvictionPolicyName, make_eviction_policy
from xllm.cache.tier import Lookup, SlotTable
from xllm.protocol import BlockHash

SUM = b"s" * 16


def name(i: int) -> BlockHash:
    return BlockHash(sha256(str(i).encode()).digest()[:16])


def make_table(num_slots: int, clock: list[float] | None = None) -> SlotTable:
    now = clock or [0.0]
    policy = make_eviction_policy(EvictionPolicyName.LRU, num_slots)
    return SlotTable(num_slots, policy, clock=lambda: now[0])


def store(table: SlotTable, i: int, parent: int | None = None) -> int:
    slot = table.prepare_store(name(i), None if parent is None else name(parent))
    assert slot is not None
    assert table.complete_store(slot, SUM)
    return slot


def test_a_block_is_pending_then_found_then_evicted() -> None:
    table = make_table(1)
    slot = table.prepare_store(name(0), None)
    assert slot is not None
    assert table.lookup(name(0)) is Lookup.PENDING
    assert table.prepare_load(name(0)) is None
    assert table.prepare_store(name(0), None) is None, "already on its way"
    assert table.prepare_store(name(1), None) is None, "a reserved slot is not evicted"
    assert table.complete_store(slot, SUM)
    assert table.lookup(name(0)) is Lookup.HIT
    store(table, 1)
    assert table.lookup(name(0)) is Lookup.MISS
    kinds = [(e.kind, e.hash) for e in table.take_events()]
    assert kinds == [
        (BlockEventKind.STORED, name(0)),
        (BlockEventKind.REMOVED, name(0)),
        (BlockEventKind.STORED, name(1)),
    ]
    assert table.take_events() == []


def test_the_age_of_what_goes_next_is_known_as_soon_as_there_is_no_room() -> None:
    now = [10.0]
    table = make_table(2, now)
    store(table, 0)
    assert table.next_victim_used_at() is None
    now[0] = 12.0
    store(table, 1)
    assert table.next_victim_used_at() == 10.0
    now[0] = 20.0
    table.touch([name(0)])
    assert table.next_victim_used_at() == 12.0
    table.clear()
    assert table.next_victim_used_at() is None
    assert table.prepare_store(name(2), None) is not None
    assert table.prepare_store(name(3), None) is not None
    assert table.next_victim_used_at() == 20.0, "both slots are being filled"


def test_an_aborted_store_leaves_nothing() -> None:
    table = make_table(1)
    slot = table.prepare_store(name(0), None)
    assert slot is not None
    assert not table.complete_store(slot, None)
    assert table.lookup(name(0)) is Lookup.MISS
    assert table.take_events() == []
    assert table.num_free == 1


def test_pinned_blocks_stay() -> None:
    table = make_table(2)
    store(table, 0)
    store(table, 1)
    loaded = table.prepare_load(name(0))
    assert loaded is not None
    assert loaded.checksum == SUM
    store(table, 2)
    assert table.lookup(name(0)) is Lookup.HIT
    assert table.lookup(name(1)) is Lookup.MISS
    other = table.prepare_load(name(2))
    assert other is not None
    assert table.prepare_store(name(3), None) is None
    assert table.statistics().num_refusals == 1
    table.complete_load(loaded.slot)
    assert table.prepare_store(name(3), None) == loaded.slot


def test_a_dropped_slot_is_free_only_after_its_readers() -> None:
    table = make_table(1)
    store(table, 0)
    first, second = table.prepare_load(name(0)), table.prepare_load(name(0))
    assert first is not None
    assert second is not None
    assert table.discard(name(0))
    assert not table.discard(name(0))
    assert table.lookup(name(0)) is Lookup.MISS
    assert table.prepare_store(name(0), None) is None
    table.complete_load(first.slot)
    assert table.num_free == 0
    table.complete_load(second.slot)
    assert table.num_free == 1


def test_a_store_that_ends_after_a_clear_is_not_published() -> None:
    table = make_table(2)
    store(table, 0)
    slot = table.prepare_store(name(1), None)
    assert slot is not None
    assert table.clear() == 1
    assert [e.kind for e in table.take_events()] == [BlockEventKind.CLEARED]
    again = table.prepare_store(name(1), None)
    assert again not in (None, slot), "the slot is reserved until its transfer has ended"
    assert not table.complete_store(slot, SUM)
    assert table.lookup(name(1)) is Lookup.PENDING
    table.check_invariants()


def test_restored_blocks_are_found_and_evicted_like_others() -> None:
    table = make_table(3)
    assert table.restore(1, name(0), None, SUM)
    assert table.restore(2, name(1), name(0), SUM)
    assert not table.restore(0, name(1), name(0), SUM), "one slot per name"
    table.finish_restore()
    table.check_invariants()
    assert table.num_free == 1
    store(table, 5)
    store(table, 6)
    assert table.lookup(name(1)) is Lookup.MISS
    assert table.lookup(name(0)) is Lookup.HIT


class Recorder:
    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.evicted: list[tuple[float, float]] = []

    def block_reused(self, gap_s: float) -> None:
        self.gaps.append(gap_s)

    def block_evicted(self, lifetime_s: float, idle_s: float) -> None:
        self.evicted.append((lifetime_s, idle_s))


def test_an_observer_learns_gaps_and_lifetimes() -> None:
    now = [0.0]
    recorder = Recorder()
    policy = make_eviction_policy(EvictionPolicyName.LRU, 1)
    table = SlotTable(1, policy, clock=lambda: now[0], observer=recorder)
    store(table, 0)
    now[0] = 3.0
    table.touch([name(0), name(1)])
    now[0] = 5.0
    store(table, 1)
    assert recorder.gaps == [3.0]
    assert recorder.evicted == [(5.0, 2.0)]


def test_misuse_is_our_own_bug() -> None:
    table = make_table(1)
    slot = store(table, 0)
    with pytest.raises(AssertionError, match="once"):
        table.complete_store(slot, SUM)
    with pytest.raises(AssertionError, match="once"):
        table.complete_load(slot)


class TableMachine(RuleBasedStateMachine):
    """Stores, loads, drops and clears in any interleaving."""

    NUM_SLOTS = 5

    def __init__(self) -> None:
        super().__init__()
        self.table = make_table(self.NUM_SLOTS)
        self.storing: dict[int, tuple[BlockHash, bool]] = {}
        """slot -> (name, still wanted)."""
        self.pins: dict[int, int] = {}
        self.known: set[BlockHash] = set()
        self.held: set[BlockHash] = set()

    @rule(ids=st.lists(st.integers(0, 9), max_size=3))
    def hold(self, ids: list[int]) -> None:
        self.table.hold(map(name, ids))
        self.held |= set(map(name, ids))

    @rule(ids=st.lists(st.integers(0, 9), max_size=3))
    def unhold(self, ids: list[int]) -> None:
        self.table.unhold(map(name, ids))
        self.held -= set(map(name, ids))

    @rule(i=st.integers(0, 9), parent=st.integers(0, 9))
    def prepare_store(self, i: int, parent: int) -> None:
        before = self.table.lookup(name(i))
        staying = [h for h in self.held if self.table.lookup(h) is Lookup.HIT]
        slot = self.table.prepare_store(name(i), name(parent))
        assert all(self.table.lookup(h) is Lookup.HIT for h in staying), "held blocks stay"
        if before is not Lookup.MISS:
            assert slot is None
        elif slot is None:
            num_kept = self.table.statistics().num_pinned
            num_dropped = sum(n > 0 for n in self.pins.values())
            assert len(self.storing) + num_kept + num_dropped >= self.NUM_SLOTS
        if slot is not None:
            assert slot not in self.storing
            assert slot not in self.pins
            self.storing[slot] = (name(i), True)

    @precondition(lambda self: self.storing)
    @rule(data=st.data(), ok=st.booleans())
    def complete_store(self, data: st.DataObject, ok: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.storing)))
        block_hash, wanted = self.storing.pop(slot)
        assert self.table.complete_store(slot, SUM if ok else None) == (ok and wanted)
        if ok and wanted:
            assert self.table.lookup(block_hash) is Lookup.HIT

    @rule(i=st.integers(0, 9))
    def prepare_load(self, i: int) -> None:
        loaded = self.table.prepare_load(name(i))
        assert (loaded is not None) == (self.table.lookup(name(i)) is Lookup.HIT)
        if loaded is not None:
            assert loaded.slot not in self.storing
            self.pins[loaded.slot] = self.pins.get(loaded.slot, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def complete_load(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.pins)))
        self.table.complete_load(slot)
        self.pins[slot] -= 1
        if not self.pins[slot]:
            del self.pins[slot]

    @rule(i=st.integers(0, 9))
    def discard(self, i: int) -> None:
        self.table.discard(name(i))
        assert self.table.lookup(name(i)) is Lookup.MISS
        for slot, (block_hash, _) in list(self.storing.items()):
            if block_hash == name(i):
                self.storing[slot] = (block_hash, False)

    @rule(ids=st.lists(st.integers(0, 9), unique=True))
    def touch(self, ids: list[int]) -> None:
        self.table.touch([name(i) for i in ids])

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.storing = {slot: (h, False) for slot, (h, _) in self.storing.items()}

    @invariant()
    def holds(self) -> None:
        self.table.check_invariants()
        self.table.check_pins(self.pins)
        for event in self.table.take_events():
            if event.kind is BlockEventKind.CLEARED:
                self.known.clear()
            elif event.kind is BlockEventKind.STORED:
                assert event.hash not in self.known
                assert event.hash is not None
                self.known.add(event.hash)
            else:
                assert event.hash is not None
                self.known.remove(event.hash)
        assert self.known == set(self.table.hashes())
        for slot, (block_hash, wanted) in self.storing.items():
            if wanted:
                assert self.table.lookup(block_hash) is Lookup.PENDING, slot


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
