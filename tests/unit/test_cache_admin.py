"""What operators may ask of a cache: lookup, clear and pins, without tiers below."""

from __future__ import annotations

import pytest

from tests.simulation import BLOCK_SIZE, Simulation, prompt_of
from xllm.cache.admin import CacheAdmin
from xllm.cache.tier import TierName
from xllm.errors import InvalidRequest


class Rig:
    def __init__(self, num_blocks: int = 16, max_pinned_blocks: int = 8) -> None:
        self.now = 0.0
        self.sim = Simulation(num_blocks)
        self.admin = CacheAdmin(
            self.sim.kv_cache,
            None,
            max_pinned_blocks=max_pinned_blocks,
            clock=lambda: self.now,
        )

    def serve(self, prompt: list[int]) -> None:
        self.sim.submit(prompt, 1)
        self.sim.run()

    def matched(self, prompt: list[int]) -> int:
        return self.admin.lookup(prompt, "").num_matched


def test_lookup_counts_full_blocks_of_the_unbroken_prefix() -> None:
    rig = Rig()
    prompt = prompt_of(3 * BLOCK_SIZE + 1)
    assert rig.matched(prompt) == 0
    rig.serve(prompt)
    found = rig.admin.lookup([*prompt, 7, 7, 7, 7, 7], "")
    assert found.matched_by_tier == found.held_by_tier == {TierName.DEVICE: 3 * BLOCK_SIZE}
    assert rig.admin.lookup(prompt, "other salt").num_matched == 0


def test_clear_counts_what_it_dropped() -> None:
    rig = Rig()
    prompt = prompt_of(3 * BLOCK_SIZE + 1)
    rig.serve(prompt)
    assert rig.admin.clear(TierName.HOST) == {}
    assert rig.admin.clear(None) == {TierName.DEVICE: 3}
    assert rig.matched(prompt) == 0


@pytest.mark.parametrize("is_cached_already", [True, False])
def test_a_pin_survives_pressure_until_its_time_is_over(is_cached_already: bool) -> None:
    rig = Rig()
    pinned = prompt_of(4 * BLOCK_SIZE + 1, seed=1)
    if is_cached_already:
        rig.serve(pinned)
    assert rig.admin.pin(pinned, "", ttl_s=10.0) == 4
    if not is_cached_already:
        rig.serve(pinned)
    for seed in range(2, 8):
        rig.serve(prompt_of(10 * BLOCK_SIZE, seed))
    rig.admin.expire()
    assert rig.matched(pinned) == 4 * BLOCK_SIZE
    rig.now = 10.0
    rig.admin.expire()
    for seed in range(8, 12):
        rig.serve(prompt_of(10 * BLOCK_SIZE, seed))
    assert rig.matched(pinned) == 0
    rig.sim.check()


def test_unpinned_blocks_are_evicted_and_pinned_ones_can_be_cleared() -> None:
    rig = Rig()
    pinned = prompt_of(4 * BLOCK_SIZE + 1, seed=1)
    rig.serve(pinned)
    rig.admin.pin(pinned, "", ttl_s=10.0)
    rig.admin.clear(None)
    assert rig.matched(pinned) == 0
    rig.serve(pinned)
    assert rig.sim.kv_cache.pool.held_block_ids
    assert rig.admin.unpin(pinned, "") == 4
    assert rig.admin.unpin(pinned, "") == 0
    rig.serve(prompt_of(16 * BLOCK_SIZE - 1, seed=2))
    assert rig.matched(pinned) == 0
    rig.sim.check()


def test_pins_leave_room_to_serve() -> None:
    rig = Rig(max_pinned_blocks=5)
    rig.admin.pin(prompt_of(4 * BLOCK_SIZE, seed=1), "", ttl_s=10.0)
    rig.admin.pin(prompt_of(5 * BLOCK_SIZE, seed=1), "", ttl_s=10.0)
    with pytest.raises(InvalidRequest, match="at most 5"):
        rig.admin.pin(prompt_of(BLOCK_SIZE, seed=2), "", ttl_s=10.0)


def test_the_longer_of_two_pins_counts() -> None:
    rig = Rig()
    prompt = prompt_of(2 * BLOCK_SIZE + 1)
    rig.serve(prompt)
    rig.admin.pin(prompt, "", ttl_s=10.0)
    rig.admin.pin(prompt, "", ttl_s=1.0)
    rig.now = 9.0
    rig.admin.expire()
    assert len(rig.sim.kv_cache.pool.held_block_ids) == 2
    rig.now = 10.0
    rig.admin.expire()
    assert rig.sim.kv_cache.pool.held_block_ids == []
