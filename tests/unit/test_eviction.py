"""Order of eviction: recency, grades of use, and tails before heads."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cache.eviction import (
    GRADES,
    EvictionPolicy,
    EvictionPolicyName,
    HeatPolicy,
    make_eviction_policy,
)
from xllm.protocol import BlockHash


def name(i: int) -> BlockHash:
    return BlockHash(sha256(str(i).encode()).digest()[:16])


def insert_chain(policy: EvictionPolicy, *ids: int) -> None:
    parent = None
    for i in ids:
        if name(i) not in policy:
            policy.insert(name(i), parent)
        parent = name(i)


def drain(policy: EvictionPolicy) -> list[BlockHash]:
    order = []
    while (victim := policy.coldest()) is not None:
        policy.remove(victim)
        order.append(victim)
    return order


@pytest.fixture(params=list(EvictionPolicyName))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return make_eviction_policy(request.param, 8)


def test_the_tail_of_a_chain_goes_before_its_head(policy: EvictionPolicy) -> None:
    insert_chain(policy, 0, 1, 2)
    insert_chain(policy, 10, 11)
    assert drain(policy) == [name(i) for i in (2, 1, 0, 11, 10)]


def test_a_chain_used_again_outlives_one_that_came_later(policy: EvictionPolicy) -> None:
    insert_chain(policy, 0, 1)
    insert_chain(policy, 10, 11)
    policy.touch([name(0), name(1), name(2)])
    assert drain(policy) == [name(i) for i in (11, 10, 1, 0)]


def test_a_branch_is_colder_than_the_shared_head(policy: EvictionPolicy) -> None:
    insert_chain(policy, 0, 1)
    policy.touch([name(0)])
    insert_chain(policy, 0, 2, 3)
    assert drain(policy) == [name(i) for i in (1, 3, 2, 0)]


def test_renewing_moves_a_block_behind_all_others(policy: EvictionPolicy) -> None:
    insert_chain(policy, 0)
    insert_chain(policy, 1)
    policy.renew(name(0))
    assert policy.cold_first(1) == [name(1)]


def test_cold_first_looks_without_changing_anything(policy: EvictionPolicy) -> None:
    insert_chain(policy, 0, 1, 2)
    policy.touch([name(0), name(1)])
    assert policy.cold_first(2) == policy.cold_first(2) == [name(2), name(1)]
    assert len(policy) == len(policy.cold_first(99)) == 3
    assert policy.cold_first(99) == drain(policy)


def test_clear_leaves_nothing(policy: EvictionPolicy) -> None:
    insert_chain(policy, 0, 1)
    policy.clear()
    assert policy.coldest() is None
    assert len(policy) == 0


def test_graded_keeps_what_was_used_twice_over_what_came_once() -> None:
    lru = make_eviction_policy(EvictionPolicyName.LRU, 20)
    graded = make_eviction_policy(EvictionPolicyName.GRADED, 20)
    for policy in (lru, graded):
        insert_chain(policy, 0)
        policy.touch([name(0)])
        insert_chain(policy, 1)
        insert_chain(policy, 2)
    assert lru.coldest() == name(0)
    assert graded.coldest() == name(1)


def test_graded_lets_go_of_what_is_not_used_any_more() -> None:
    policy = make_eviction_policy(EvictionPolicyName.GRADED, 10)
    insert_chain(policy, 0)
    policy.touch([name(0)])
    for i in range(1, 30):
        insert_chain(policy, i)
    assert policy.coldest() == name(1)
    for i in range(1, 10):
        policy.remove(name(i))
    assert policy.coldest() == name(0)


def test_a_ghost_comes_back_with_its_uses() -> None:
    policy = HeatPolicy(10, GRADES, num_ghosts=1)
    for i in (0, 1):
        insert_chain(policy, i)
    policy.remove(name(0))
    insert_chain(policy, 0)
    insert_chain(policy, 2)
    assert drain(policy) == [name(1), name(2), name(0)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=40))
def test_no_block_is_ever_colder_than_what_hangs_below_it(
    steps: list[tuple[int, int, bool]],
) -> None:
    """Whole chains come and are used; any number of blocks is evicted in between."""
    policy = make_eviction_policy(EvictionPolicyName.LRU, 8)
    for chain_id, length, evict in steps:
        ids = [chain_id * 10 + i for i in range(length)]
        policy.touch([name(i) for i in ids])
        insert_chain(policy, *ids)
        if evict and (victim := policy.coldest()) is not None:
            policy.remove(victim)
        order = {block_hash: i for i, block_hash in enumerate(policy.cold_first(99))}
        assert set(order) == set(policy)
        for block in range(40):
            if block % 10 and name(block) in order and name(block - 1) in order:
                assert order[name(block)] < order[name(block - 1)]
