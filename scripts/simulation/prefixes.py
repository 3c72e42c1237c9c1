"""The workload of `bench cluster shared_prefix` on simulated workers: the whole rate curve.

Workers of this kind compute as long as their rates say and use no processor, so that workers,
master and generator do not take it from each other, and each point can have thousands of requests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from simulation.cluster import Cluster
from simulation.policies import FETCHING, ROUTINGS
from simulation.summary import Summary
from simulation.trace import Arrival, scatter
from simulation.worker import Rates

POLICIES = ("RR", "RR+peers", "LEAST_LOAD", "LEAST_LOAD+peers", "CAR", "CAR+peers")
NUM_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """`groups` system prompts; each request is one of them and a question of its own. Lengths in
    tokens; a worker's device holds `cache_share` of the system prompts."""

    groups: int = 24
    system: int = 1024
    question: int = 32
    output: int = 8
    cache_share: float = 0.4
    requests: int = 4000
    seed: int = 1

    def device_blocks(self, block_size: int) -> int:
        return int(self.cache_share * self.groups * self.system / block_size)

    def arrivals(self, rate: float, block_size: int) -> list[Arrival]:
        """A Poisson process of `rate` requests per second; groups are drawn evenly."""
        rng = random.Random(self.seed)
        numbers = map(scatter, count())
        per_system, per_question = self.system // block_size, self.question // block_size
        systems = [tuple(next(numbers) for _ in range(per_system)) for _ in range(self.groups)]
        at = 0.0
        arrivals = []
        for number in range(self.requests):
            at += rng.expovariate(rate)
            hashes = rng.choice(systems) + tuple(next(numbers) for _ in range(per_question))
            arrivals.append(Arrival(number, at, self.system + self.question, self.output, hashes))
        return arrivals


@dataclass(frozen=True, slots=True)
class Point:
    policy: str
    share: float
    """Of the rate at which RR without peers saturates."""
    rate: float
    summary: Summary


def measure(workload: Workload, rates: Rates, shares: Sequence[float]) -> list[Point]:
    """Every policy at every share."""
    saturation = saturation_rate(workload, rates)
    return [
        Point(policy, share, share * saturation, _run(workload, rates, policy, share * saturation))
        for share in shares
        for policy in POLICIES
    ]


def saturation_rate(workload: Workload, rates: Rates) -> float:
    """Requests per second that RR without peers answers when there are always some that wait."""
    return workload.requests / max(_run(workload, rates, "RR", 1e3).ttft_s)


def _run(workload: Workload, rates: Rates, policy: str, rate: float) -> Summary:
    device = workload.device_blocks(rates.block_size)
    make = FETCHING.get(policy) or ROUTINGS[policy]
    cluster = Cluster(NUM_WORKERS, rates, [("device", device)], make, policy in FETCHING)
    return cluster.run(workload.arrivals(rate, rates.block_size))
