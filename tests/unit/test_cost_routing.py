"""Routing by estimated TTFT; the defects of other routers are in test_router_defects.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode
from xllm.cache.index import CacheIndex
from xllm.protocol import Epoch, PrefillCost, WorkerId, WorkerLoad
from xllm.roles import cost_model
from xllm.roles.cost_model import ReuseMeter
from xllm.roles.cost_routing import CREDIT_S, CostRouting, Fetch, Prompt, Targets
from xllm.roles.global_scheduler import Candidate

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
DEVICE, HOST, DISK, REMOTE = TierCode
BLOCK = 16
COST = PrefillCost(step_s=0.01, token_s=1e-3, pair_s=0.0)
BLOCK_S = BLOCK * COST.token_s


class World:
    """A master's routing with a clock that is turned by hand."""

    def __init__(self, *workers: WorkerId) -> None:
        self.now = 100.0
        self.index = CacheIndex()
        self.routing = CostRouting(self.index, BLOCK, lambda: self.now)
        self.candidates = [Candidate(worker, None, 0) for worker in workers or (A, B)]
        self._number = 0
        for candidate in self.candidates:
            self.report(candidate.worker_id)

    def report(self, worker: WorkerId, num_unacknowledged: int = 0, **fields: Any) -> None:
        load = WorkerLoad(epoch=Epoch(1), **({"prefill_cost": COST} | fields))
        self.routing.report(worker, load, num_unacknowledged)

    def hold(self, worker: WorkerId, hashes: Sequence[int], tier: TierCode = DEVICE) -> None:
        section = Section(tier, BlockEventKind.STORED, tuple(hashes))
        self.index.apply(worker, EventBatch((section,)))

    def prompt(self, hashes: Sequence[int]) -> Prompt:
        self._number += 1
        return Prompt(f"r{self._number}", tuple(hashes), len(hashes) * BLOCK + 1)

    def route(self, hashes: Sequence[int]) -> WorkerId:
        return self.routing.route(self.prompt(hashes), self.candidates).worker_id

    def send(self, hashes: Sequence[int]) -> tuple[str, WorkerId]:
        prompt = self.prompt(hashes)
        estimate = self.routing.route(prompt, self.candidates)
        self.routing.dispatched(prompt, estimate)
        return prompt.request_id, estimate.worker_id


PREFIX = tuple(range(1000, 1010))
OTHER = tuple(range(2000, 2010))


# Load


def test_a_queue_longer_than_what_the_prefix_saves_is_passed() -> None:
    world = World()
    world.hold(A, PREFIX)
    saved_s = len(PREFIX) * BLOCK_S * (1 + cost_model.WAITING_FACTOR)
    world.report(A, queue_s=saved_s * 0.9)
    assert world.route(PREFIX) == A
    world.report(A, queue_s=saved_s * 1.1)
    assert world.route(PREFIX) == B


def test_a_reported_queue_drains_with_time() -> None:
    world = World()
    world.hold(A, PREFIX)
    world.report(A, queue_s=10.0)
    assert world.route(PREFIX) == B
    world.now += 10.0
    assert world.route(PREFIX) == A


def test_own_dispatches_count_until_a_report_has_them() -> None:
    world = World()
    _, first = world.send(PREFIX)
    (backlog,) = {
        e.parts.backlog_s
        for e in world.routing.explain(world.prompt(OTHER), world.candidates)
        if e.worker_id == first
    }
    assert backlog == pytest.approx(COST.seconds(0, len(PREFIX) * BLOCK + 1))
    world.report(first, num_unacknowledged=1, queue_s=1.0)
    assert world.routing.explain(world.prompt(OTHER), world.candidates)[-1].parts.backlog_s > 1.1
    world.report(first, queue_s=1.0)
    assert world.routing.explain(world.prompt(OTHER), world.candidates)[-1].parts.backlog_s == 1.0


def test_decodes_slow_a_prefill_down() -> None:
    world = World()
    world.report(A, running_requests_num=4, decode_step_s=cost_model.MAX_STEP_S / 2)
    fast, slow = world.routing.explain(world.prompt(PREFIX), world.candidates)
    assert (fast.worker_id, slow.worker_id) == (B, A)
    assert slow.parts.computing_s == pytest.approx(2 * fast.parts.computing_s)


def test_a_tier_slower_than_computing_counts_as_computing() -> None:
    world = World()
    world.report(B, tier_block_s={"disk": BLOCK_S * 100})
    world.hold(B, PREFIX, DISK)
    by_worker = {
        e.worker_id: e.parts for e in world.routing.explain(world.prompt(PREFIX), world.candidates)
    }
    assert by_worker[B].ttft_s == pytest.approx(by_worker[A].ttft_s)


def test_a_worker_that_measured_nothing_is_taken_for_an_average_one() -> None:
    world = World(A)
    world.candidates.append(Candidate(B, None, 0))
    costs = {e.parts.cost_s for e in world.routing.explain(world.prompt(OTHER), world.candidates)}
    assert len(costs) == 1


# Credit


def test_a_burst_with_a_new_prefix_follows_its_first_request() -> None:
    world = World(*(WorkerId(f"w{i}") for i in range(8)))
    world.send(PREFIX)
    _, first = world.send(PREFIX)
    prompts = [(*PREFIX, 3000 + i) for i in range(3)]
    assert {world.send(prompt)[1] for prompt in prompts} == {first}


def test_credit_ends_two_seconds_after_the_first_token_unless_the_blocks_are_there() -> None:
    world = World()
    request_id, worker = world.send(PREFIX)
    world.now += 1.0
    outcome = world.routing.first_token(request_id)
    assert outcome is not None
    assert (outcome.worker_id, outcome.measured_s) == (worker, 1.0)

    def held() -> int:
        estimates = world.routing.explain(world.prompt(PREFIX), world.candidates)
        return max(sum(e.prefix) for e in estimates)

    world.now += CREDIT_S - 0.01
    assert held() == len(PREFIX)
    world.now += 0.02
    assert held() == 0
    world.hold(worker, PREFIX[:4])
    assert held() == 4
    assert world.routing.first_token(request_id) is None


def test_two_prompts_vouch_for_what_they_share() -> None:
    world = World(A)
    first, _ = world.send(PREFIX)
    world.send((*PREFIX[:5], *OTHER))
    world.routing.ended(first)
    (estimate,) = world.routing.explain(world.prompt(PREFIX), world.candidates)
    assert sum(estimate.prefix) == 5


# Peers, eviction, ties


def test_blocks_of_a_peer_are_fetched_when_that_is_quicker() -> None:
    world = World()
    world.hold(A, PREFIX)
    world.report(A, queue_s=60.0)
    assert world.routing.explain(world.prompt(PREFIX), world.candidates)[0].fetch is None
    world.report(B, tier_block_s={"peer": BLOCK_S / 10})
    world.hold(B, PREFIX[:3])
    best = world.routing.explain(world.prompt(PREFIX), world.candidates)[0]
    assert (best.worker_id, best.fetch) == (B, Fetch(A, 3, len(PREFIX) - 3))
    assert best.parts.fetching_s == pytest.approx(7 * BLOCK_S / 10)
    world.report(B, tier_block_s={"peer": BLOCK_S * 10})
    assert world.routing.explain(world.prompt(PREFIX), world.candidates)[0].fetch is None


def test_a_short_shared_prefix_does_not_fill_one_worker_while_others_are_empty() -> None:
    world = World()
    reused = [range(i * 100, i * 100 + 64) for i in range(40)]
    for _ in range(3):
        for hashes in reused:
            world.routing.route(world.prompt(tuple(h * 16 for h in hashes)), world.candidates)
            world.now += 1.0
    world.hold(A, (1,))
    assert world.route((1, *range(9000, 9100))) == A
    world.report(A, eviction_age_s={"device": 10.0})
    assert world.route((1, *range(9000, 9100))) == B


def test_evicting_what_another_tier_keeps_costs_only_its_load() -> None:
    world = World()
    for _ in range(3):
        world.routing.route(world.prompt(tuple(range(0, 1600, 16))), world.candidates)
        world.now += 100.0
    world.report(A, eviction_age_s={"device": 1.0})
    world.report(B, eviction_age_s={"device": 1.0}, tier_block_s={"host": BLOCK_S / 50})
    best, other = world.routing.explain(world.prompt(OTHER), world.candidates)
    assert best.worker_id == B
    assert best.parts.displacing_s == pytest.approx(other.parts.displacing_s / 50)


def test_masters_agree_on_ties_and_ties_spread() -> None:
    workers = [WorkerId(f"w{i}") for i in range(8)]
    worlds = [World(*workers), World(*reversed(workers))]
    chosen = []
    for i in range(200):
        hashes = (i * 7919, i)
        first, second = (world.route(hashes) for world in worlds)
        assert first == second
        chosen.append(first)
    assert {chosen.count(worker) for worker in workers} <= set(range(10, 50))


def test_reuse_meter_learns_how_long_blocks_rest() -> None:
    meter = ReuseMeter()
    rng = random.Random(3)
    assert meter.chance(1.0) == 0.0
    now = 0.0
    for i in range(400):
        fresh = [16 * rng.getrandbits(40) for _ in range(10)]
        meter.observe(fresh, now)
        if i % 2:
            meter.observe(fresh, now + 30.0)
        now += 40.0
    assert meter.chance(0.0) == pytest.approx(1 / 3, abs=0.02)
    assert meter.chance(10.0) == pytest.approx(1 / 3, abs=0.02)
    assert meter.chance(64.0) == 0.0


# Workers that are alike, workers that decode, workers that are late


def costs(world: World, hashes: Sequence[int] = OTHER) -> dict[WorkerId, float]:
    estimates = world.routing.explain(world.prompt(hashes), world.candidates)
    return {estimate.worker_id: estimate.parts.cost_s for estimate in estimates}


def test_noise_in_what_workers_measure_breaks_no_ties() -> None:
    world = World()
    for factor in (1.0, 1.2, 0.95):
        cost = PrefillCost(COST.step_s * factor, COST.token_s * factor, COST.pair_s)
        world.report(B, prefill_cost=cost)
        assert len(set(costs(world).values())) == 1
    world.report(B, prefill_cost=PrefillCost(COST.step_s, COST.token_s * 2, COST.pair_s))
    assert costs(world)[B] > 1.5 * costs(world)[A]
    world.report(B, prefill_cost=COST)
    assert len(set(costs(world).values())) == 1


def test_requests_that_no_report_has_yet_slow_prompts_down() -> None:
    world = World()
    world.candidates = [Candidate(A, None, 20), Candidate(B, None, 0)]
    alone, busy = costs(world)[B], costs(world)[A]
    # 20 sequences more make the step of 10 ms one of 30, which leaves prompts 50 of its 80 ms.
    assert busy == pytest.approx(alone * 80 / 50)


def test_a_prompt_of_less_than_a_block_goes_where_the_fewest_requests_are() -> None:
    world = World(A, B, C)
    world.candidates = [Candidate(A, None, 2), Candidate(B, None, 1), Candidate(C, None, 2)]
    assert world.routing.route(Prompt("r", (), 1), world.candidates).worker_id == B


def test_only_those_that_keep_the_targets_are_chosen_from() -> None:
    world = World()
    world.report(A, queue_s=3.0)
    world.report(B, running_requests_num=8, decode_step_s=0.06)
    prompt = world.prompt(OTHER)

    def chosen(ttft_s: float, tpot_s: float) -> WorkerId | None:
        targets = Targets(ttft_s, tpot_s)
        estimate = world.routing.route_in_time(prompt, world.candidates, targets)
        return estimate and estimate.worker_id

    assert chosen(5.0, 0.1) == B, "the quicker one"
    assert chosen(5.0, 0.05) == A, "the other one's steps are too long"
    assert chosen(0.9, 0.1) == B
    assert chosen(0.9, 0.05) is None


def test_blocks_are_fetched_only_from_peers_that_serve_them() -> None:
    world = World(A, B, C)
    for worker in (A, B, C):
        world.report(worker, tier_block_s={"peer": BLOCK_S / 100})
    world.report(A, queue_s=9.0)
    world.hold(A, PREFIX)
    world.hold(B, PREFIX[:5])
    world.candidates = [Candidate(C, None, 0)]
    for peers, fetch in (
        (None, Fetch(A, 0, 10)),
        ({A, B}, Fetch(A, 0, 10)),
        ({B}, Fetch(B, 0, 5)),
        (set(), None),
    ):
        estimate = world.routing.route(world.prompt(PREFIX), world.candidates, peers)
        assert estimate.fetch == fetch


# The shared store

NEAR = {"tier_block_s": {"remote": 1e-4}}


def test_a_block_in_the_store_is_near_every_worker_that_uses_it() -> None:
    world = World(A, B, C)
    for worker in (A, B):
        world.report(worker, **NEAR)
    world.hold(A, PREFIX, REMOTE)
    estimates = {
        e.worker_id: e for e in world.routing.explain(world.prompt(PREFIX), world.candidates)
    }
    assert {worker: e.prefix for worker, e in estimates.items()} == {
        A: [0, 0, 0, 10],
        B: [0, 0, 0, 10],
        C: [0, 0, 0, 0],
    }
    assert estimates[B].parts.loading_s == pytest.approx(10 * 1e-4)
    assert estimates[B].parts.computing_s == pytest.approx(COST.seconds(160, 1))
    world.report(A, queue_s=1.0, **NEAR)
    assert world.route(PREFIX) == B


def test_a_prefix_goes_on_in_the_store_where_the_worker_ends_and_stops_at_a_gap() -> None:
    world = World()
    for worker in (A, B):
        world.report(worker, **NEAR)
    world.hold(A, PREFIX[:3])
    world.hold(B, (*PREFIX[2:7], *PREFIX[8:]), REMOTE)
    best, other = world.routing.explain(world.prompt(PREFIX), world.candidates)
    assert (best.worker_id, best.prefix) == (A, [3, 0, 0, 4])
    assert other.prefix == [0, 0, 0, 0]


def test_a_worker_that_has_lost_the_store_computes() -> None:
    world = World()
    world.report(A, **NEAR)
    world.hold(B, PREFIX, REMOTE)
    assert world.route(PREFIX) == A
    world.report(A)
    assert all(
        e.prefix == [0, 0, 0, 0]
        for e in world.routing.explain(world.prompt(PREFIX), world.candidates)
    )


def test_peer_or_store_whichever_is_quicker() -> None:
    world = World()
    world.hold(A, PREFIX)
    world.hold(A, PREFIX[:8], REMOTE)
    for peer_s, prefix, first in ((1e-3, [0, 0, 0, 8], 8), (1e-5, [0, 0, 0, 0], 0)):
        world.report(B, tier_block_s={"remote": 1e-4, "peer": peer_s})
        (estimate,) = world.routing.explain(world.prompt(PREFIX), [Candidate(B, None, 0)])
        assert estimate.prefix == prefix
        assert estimate.fetch == Fetch(A, first, 10 - first)


def test_what_is_only_in_the_store_is_fetched_from_no_peer() -> None:
    world = World()
    world.report(B, tier_block_s={"peer": 1e-4})
    world.hold(A, PREFIX, REMOTE)
    (estimate,) = world.routing.explain(world.prompt(PREFIX), [Candidate(B, None, 0)])
    assert estimate.fetch is None
    assert estimate.prefix == [0, 0, 0, 0]
