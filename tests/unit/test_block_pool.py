from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm.cache.block_pool import BlockEventKind, BlockPool
from xllm.protocol import BlockHash


def name(i: int) -> BlockHash:
    return BlockHash(sha256(str(i).encode()).digest()[:16])


def cached_chain(pool: BlockPool, first: int, count: int) -> list[int]:
    block_ids = pool.allocate(count) or []
    for i, block_id in enumerate(block_ids):
        pool.commit(block_id, name(first + i))
    pool.release(block_ids)
    return block_ids


def test_allocate_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    assert sorted(pool.allocate(4) or []) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_unnamed_blocks_go_before_cached_ones_and_tails_before_heads() -> None:
    pool = BlockPool(4)
    chain = pool.allocate(3)
    assert chain is not None
    for i, block_id in enumerate(chain[:2]):
        pool.commit(block_id, name(i))
    pool.release(chain)
    unnamed = {chain[2], ({0, 1, 2, 3} - set(chain)).pop()}
    assert set(pool.allocate(2) or []) == unnamed
    assert pool.allocate(1) == [chain[1]]
    assert pool.lookup(name(0)) == chain[0]
    assert pool.lookup(name(1)) is None


def test_the_age_of_what_goes_next_is_known_as_soon_as_there_is_no_room() -> None:
    now = [10.0]
    pool = BlockPool(3, clock=lambda: now[0])
    blocks = pool.allocate(2) or []
    pool.commit(blocks[0], name(0))
    assert pool.next_victim_used_at() is None
    third = pool.allocate(1) or []
    assert pool.next_victim_used_at() == 10.0, "all are in use"
    pool.commit(blocks[1], name(1))
    now[0] = 15.0
    pool.commit(third[0], name(2))
    pool.release([blocks[0]])
    pool.release([blocks[1]])
    pool.release(third)
    assert pool.next_victim_used_at() == 10.0
    now[0] = 20.0
    for block_id in blocks:
        pool.acquire([block_id])
        pool.observe_reuse([block_id])
        pool.release([block_id])
    assert pool.next_victim_used_at() == 15.0, "the third is the next to go"


def test_a_second_copy_stays_unnamed() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block_id in blocks:
        pool.commit(block_id, name(7))
    assert pool.lookup(name(7)) == blocks[0]
    assert pool.hash_of(blocks[1]) is None
    assert [e.kind for e in pool.take_events()] == [BlockEventKind.STORED]


def test_a_cached_block_that_is_used_again_is_not_evicted() -> None:
    pool = BlockPool(2)
    (first,) = pool.allocate(1) or []
    pool.commit(first, name(0))
    pool.release([first])
    pool.acquire([first])
    assert pool.allocate(2) is None
    assert pool.lookup(name(0)) == first


def test_what_a_peer_has_too_goes_first_tail_before_head() -> None:
    pool = BlockPool(6)
    old, lent = cached_chain(pool, 0, 2), cached_chain(pool, 2, 2)
    for block_id in lent:
        pool.acquire([block_id])
        pool.release([block_id], has_peer=True)
    pool.check_invariants()
    assert pool.coldest(6) == [name(3), name(2), name(1), name(0)]
    assert pool.allocate(3) is not None, "two are free"
    assert [pool.lookup(name(i)) for i in range(4)] == [*old, lent[0], None]
    pool.check_invariants()


def test_what_a_peer_has_too_is_like_others_once_it_is_used_here() -> None:
    pool = BlockPool(4)
    lent, young = cached_chain(pool, 0, 2), cached_chain(pool, 2, 2)
    pool.acquire(lent)
    pool.release(lent, has_peer=True)
    pool.acquire(lent)
    pool.release(lent)
    assert pool.allocate(2) is not None
    assert [pool.lookup(name(i)) for i in range(4)] == [*lent, None, None]
    assert not set(lent) & set(young)


def test_names_that_are_forgotten_are_forgotten_of_lent_blocks_too() -> None:
    pool = BlockPool(2)
    lent = cached_chain(pool, 0, 1)
    pool.acquire(lent)
    pool.release(lent, has_peer=True)
    assert pool.clear() == 1
    pool.check_invariants()
    assert len(pool.allocate(2) or []) == 2


def test_clear_forgets_names_but_keeps_used_blocks() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.commit(blocks[0], name(0))
    assert pool.clear() == 1
    assert pool.lookup(name(0)) is None
    assert pool.num_free == 1
    assert [e.kind for e in pool.take_events()] == [BlockEventKind.CLEARED]
    pool.release(blocks)
    pool.check_invariants()


def test_misuse_is_our_own_bug() -> None:
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1) or []
    pool.commit(block_id, name(0))
    with pytest.raises(AssertionError, match="once"):
        pool.commit(block_id, name(1))
    pool.release([block_id])
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block_id])


class PoolMachine(RuleBasedStateMachine):
    """Random chains come, are shared, committed and go; the pool is compared with a naive model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.held: list[list[int]] = []
        self.known: set[BlockHash] = set()

    @rule(n=st.integers(0, 5))
    def allocate(self, n: int) -> None:
        used = {b for chain in self.held for b in chain} | set(self.pool.held_block_ids)
        blocks = self.pool.allocate(n)
        assert (blocks is None) == (n > 8 - len(used))
        if blocks is not None:
            assert not used.intersection(blocks)
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), i=st.integers(0, 20))
    def commit(self, data: st.DataObject, i: int) -> None:
        chain = data.draw(st.sampled_from(self.held))
        fresh = [b for b in chain if self.pool.hash_of(b) is None]
        if fresh:
            self.pool.commit(fresh[0], name(i))
            assert self.pool.lookup(name(i)) is not None

    @rule(i=st.integers(0, 20))
    def share(self, i: int) -> None:
        block_id = self.pool.lookup(name(i))
        if block_id is not None:
            self.pool.acquire([block_id])
            self.held.append([block_id])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), has_peer=st.booleans())
    def release(self, data: st.DataObject, has_peer: bool) -> None:
        chain = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(chain, has_peer=has_peer)

    @rule(ids=st.lists(st.integers(0, 20), max_size=3))
    def hold(self, ids: list[int]) -> None:
        self.pool.hold(map(name, ids))

    @rule(ids=st.lists(st.integers(0, 20), max_size=3))
    def unhold(self, ids: list[int]) -> None:
        self.pool.unhold(map(name, ids))

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.known.clear()

    @invariant()
    def holds(self) -> None:
        self.pool.check_invariants()
        references = dict.fromkeys(self.pool.held_block_ids, 1)
        for chain in self.held:
            for block_id in chain:
                references[block_id] = references.get(block_id, 0) + 1
        self.pool.check_references(references)
        for event in self.pool.take_events():
            if event.kind is BlockEventKind.CLEARED:
                self.known.clear()
                continue
            assert event.hash is not None
            if event.kind is BlockEventKind.STORED:
                assert event.hash not in self.known
                self.known.add(event.hash)
            else:
                self.known.remove(event.hash)
        assert self.known == {name(i) for i in range(21) if self.pool.lookup(name(i)) is not None}


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
