"""A small simulated cluster: the uploads that it makes, read back, are what its workers hold."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from simulation.cluster import Cluster
from simulation.policies import FETCHING, ROUTINGS
from simulation.prefixes import Workload, measure
from simulation.trace import Arrival, pooled_reuse
from simulation.worker import RATES as RATES_FILES
from simulation.worker import read_rates

from xllm.cache.event_codec import TierCode

RATES = read_rates(RATES_FILES["gpu"])
TIERS = (("device", 64), ("host", 128), ("disk", 256))


def conversations(num_users: int = 6, num_turns: int = 6) -> list[Arrival]:
    """Users that share a system prompt and come back with all they have said."""
    rng = random.Random(5)
    said = [[1, 2] for _ in range(num_users)]
    arrivals = []
    for number in range(num_users * num_turns):
        user = rng.randrange(num_users)
        said[user] += [rng.getrandbits(64) for _ in range(4)]
        blocks = tuple(said[user])
        arrivals.append(Arrival(number, number * 0.5, len(blocks) * 64 + 5, 20, blocks))
    return arrivals


@pytest.mark.parametrize("policy", [*ROUTINGS, *FETCHING])
def test_every_prompt_gets_its_first_token_and_the_index_is_what_workers_hold(policy: str) -> None:
    arrivals = conversations()
    cluster = Cluster(4, RATES, TIERS, FETCHING.get(policy) or ROUTINGS[policy], policy in FETCHING)
    summary = cluster.run(arrivals)
    assert len(summary.ttft_s) == len(arrivals)
    assert 0.0 < summary.mean_ttft_s < 1.0
    for worker in cluster.workers.values():
        for tier, cache in zip(TierCode, worker.tiers.values(), strict=False):
            for block in cache.used_at:
                assert (worker.worker_id, tier) in cluster.index.holders(block)
            assert cluster.index.num_held(worker.worker_id)[tier] == len(cache.used_at)


def test_cost_aware_routing_finds_nearly_what_one_pooled_cache_would_have() -> None:
    arrivals = conversations()
    reuse = {
        policy: Cluster(4, RATES, TIERS[:1], ROUTINGS[policy]).run(arrivals).reuse
        for policy in ("CAR", "RR")
    }
    assert reuse["CAR"] >= 0.9 * pooled_reuse(arrivals, 4 * 64)
    assert reuse["CAR"] > 1.5 * reuse["RR"]


def test_with_peers_two_workers_find_in_each_other_what_neither_can_hold_alone() -> None:
    rates = read_rates(RATES_FILES["cpu"])  # slow enough for the index to follow
    points = measure(Workload(groups=8, requests=120), rates, [0.7])
    reuse = {point.policy: point.summary.reuse for point in points}
    assert reuse["RR+peers"] > 1.2 * reuse["RR"]
    assert min(reuse["CAR"], reuse["CAR+peers"]) > 1.5 * reuse["RR"]
