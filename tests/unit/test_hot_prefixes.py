"""Prefixes that are wanted faster than their holders can serve them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import pytest

from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode, short_hashes
from xllm.cache.index import CacheIndex
from xllm.protocol import BlockHash, WorkerId
from xllm.roles import hot_prefixes
from xllm.roles.hot_prefixes import PAUSE_S, Assignment, HotPrefixes

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def names(*numbers: int) -> list[BlockHash]:
    return [BlockHash(sha256(str(n).encode()).digest()[:16]) for n in numbers]


SYSTEM = names(*range(16))


class World:
    def __init__(self) -> None:
        self.now = 50.0
        self.index = CacheIndex()
        self.hot = HotPrefixes(self.index, lambda: self.now)
        self.backlogs = {A: 5.0, B: 0.2, C: 0.1}
        self._number = 1000

    def hold(self, worker: WorkerId, held: Sequence[BlockHash]) -> None:
        section = Section(TierCode.DEVICE, BlockEventKind.STORED, short_hashes(held))
        self.index.apply(worker, EventBatch((section,)))

    def ask(self, seconds: float, workers: float, prefix: Sequence[BlockHash] = SYSTEM) -> None:
        """Requests with questions of their own, which keep so many workers busy."""
        for _ in range(int(seconds * 10)):
            self._number += 20
            question = names(*range(self._number, self._number + 20))
            self.hot.observe([*prefix, *question], workers / 10)
            self.now += 0.1

    def assign(self) -> list[Assignment]:
        return self.hot.assign(self.backlogs.__getitem__, self.backlogs.keys())


def test_a_prefix_that_its_holder_cannot_serve_alone_goes_to_the_least_busy_of_the_others() -> None:
    world = World()
    world.hold(A, SYSTEM)
    world.ask(10, workers=0.5)
    assert world.assign() == []
    world.ask(5, workers=1.5)
    assert world.assign() == [Assignment(C, SYSTEM, [A])]


def test_one_more_holder_at_a_time_until_they_are_enough() -> None:
    world = World()
    world.hold(A, SYSTEM)
    world.ask(10, workers=1.9)
    assert [assignment.worker for assignment in world.assign()] == [C]
    assert world.assign() == [], "its fetch is under way"
    world.hold(C, SYSTEM)
    world.ask(PAUSE_S + 0.1, workers=1.9)
    (second,) = world.assign()
    assert (second.worker, second.holders) == (B, [A, C])
    world.hold(B, SYSTEM)
    world.ask(PAUSE_S + 0.1, workers=1.9)
    assert world.assign() == []


def test_what_only_a_worker_that_leaves_holds_is_fetched_by_another() -> None:
    world = World()
    world.hold(A, SYSTEM)
    world.ask(0.2, workers=0.01)
    backlog, staying = world.backlogs.__getitem__, [B, C]
    assert world.assign() == [], "nobody has to be spared for it"
    assert world.hot.rescue(backlog, staying, []) == []
    (rescued,) = world.hot.rescue(backlog, staying, [A])
    assert rescued == Assignment(C, SYSTEM, [A]), "as long as it is held, by the least busy"
    assert world.hot.rescue(backlog, staying, [A]) == [], "its fetch is under way"
    world.hold(C, SYSTEM)
    world.now += PAUSE_S + 0.1
    assert world.hot.rescue(backlog, staying, [A]) == []
    assert world.hot.rescue(backlog, [], [A]) == []


def test_what_is_rescued_is_dealt_out_and_the_last_ones_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hot_prefixes, "MAX_RESCUED", 4)
    monkeypatch.setattr(hot_prefixes, "MAX_RESCUE_LOOKUPS", 6)
    world = World()
    prompts = [names(*range(n, n + 4)) for n in range(5000, 5100, 10)]
    for prompt in prompts:
        world.hold(A, prompt)
        world.hot.observe(prompt, 0.1)
    world.hold(B, prompts[-1])
    rescued = world.hot.rescue(world.backlogs.__getitem__, [B, C], [A])
    assert [a.worker for a in rescued] == [C, B, C, B]
    assert [a.names for a in rescued] == prompts[-2:-6:-1]


def test_one_long_prompt_is_not_wanted_by_many() -> None:
    world = World()
    world.hold(A, SYSTEM)
    world.hot.observe(SYSTEM, 30.0)
    assert world.assign() == []
    world.hot.observe(SYSTEM, 0.1)
    assert world.assign() == [Assignment(C, SYSTEM, [A])]


def test_demand_that_is_over_is_forgotten() -> None:
    world = World()
    world.hold(A, SYSTEM)
    world.ask(10, workers=1.5)
    world.now += 10
    assert world.assign() == []


def test_what_nobody_holds_cannot_be_fetched() -> None:
    world = World()
    world.ask(10, workers=1.5)
    world.hold(A, SYSTEM[:15])
    assert [len(a.names) for a in world.assign()] == []


def test_prefixes_that_nobody_repeats_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_prefixes, "MAX_TRACKED", 50)
    world = World()
    world.ask(20, workers=1.0)
    assert len(world.hot._demands) == 50
    world.hold(A, SYSTEM)
    assert [a.names for a in world.assign()] == [SYSTEM]
