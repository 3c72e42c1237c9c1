"""Which prefixes are wanted faster than those who hold them can serve them, and who is to fetch
them ahead of requests. Pure.

A request is counted at a few lengths of its prompt: 1, 2, 4, 8, ... blocks. What it counts with are
the seconds that it keeps a worker busy once the prefix is there, so demand is in workers: 1.5 is
more than one worker can serve. Counts fade with a half-life of `HALF_LIFE_S`. Names of blocks are
chained, so the last one of a prefix stands for all of it.

    demand of a prefix     workers that hold it     who fetches it
    up to LOAD * holders   ...                      nobody
    more                   some                     the least busy of the others, one at a time

Of the nested prefixes that are too hot, the longest goes that still has most of the demand: a
system prompt, not what one user wrote after it.

What a worker holds that leaves, and nobody else, is fetched while it can still be asked, whether it
is wanted by many or not.

Routing itself would spread a hot prefix, too, as soon as a queue costs more than a fetch; then it
is a request that waits for the fetch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice

from xllm.cache.event_codec import short_hash
from xllm.cache.index import CacheIndex
from xllm.protocol import BlockHash, WorkerId

HALF_LIFE_S = 2.0
LOAD = 0.7
"""Of a worker's time, before another one is to hold the prefix, too."""
MOST = 0.7
"""Of the demand of a prefix: what a longer one has, if it is to go instead."""
SEVERAL = 1.5
"""Requests, faded: one alone, however long its prompt is, is no reason to copy it."""
FORGOTTEN_S = 20.0
"""After ten half-lives nothing is hot."""
MIN_BLOCKS = 4
"""Shorter ones are computed while a command travels."""
PAUSE_S = 2.0
"""Until the same prefix is given to another worker: the first one's fetch has to show."""
MAX_TRACKED = 4096
MAX_RESCUED = 32
"""Prefixes of workers that leave, at a time."""
MAX_RESCUE_LOOKUPS = 256
"""Of those that are tracked, the last ones."""

_LEAST_BUSY_S = LOAD * HALF_LIFE_S / math.log(2)
"""Less is not hot, however fresh it is."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """`worker` is to have these blocks of a prompt, which all of `holders` have."""

    worker: WorkerId
    names: Sequence[BlockHash]
    holders: Sequence[WorkerId]


class _Demand:
    __slots__ = ("at", "busy_s", "count", "names", "not_before")

    def __init__(self, names: Sequence[BlockHash], now: float) -> None:
        self.names = names
        self.busy_s = 0.0
        self.count = 0.0
        """Of requests; like `busy_s`, faded to the time `at`."""
        self.at = now
        self.not_before = now

    def workers(self, now: float) -> float:
        """Seconds of work per second."""
        return self.busy_s * _fade(now - self.at) * math.log(2) / HALF_LIFE_S

    def num_requests(self, now: float) -> float:
        return self.count * _fade(now - self.at)

    def add(self, busy_s: float, now: float) -> None:
        fade = _fade(now - self.at)
        self.busy_s = self.busy_s * fade + busy_s
        self.count = self.count * fade + 1.0
        self.at = now


class HotPrefixes:
    """Of the requests that one master has sent. `clock` is monotonic, in seconds."""

    def __init__(self, index: CacheIndex, clock: Callable[[], float]) -> None:
        self._index = index
        self._clock = clock
        self._demands: dict[int, _Demand] = {}
        """By short hash of the last block, the one that was not seen for longest first."""

    def observe(self, names: Sequence[BlockHash], busy_s: float) -> None:
        """A prompt with these full blocks was sent, and will keep its worker busy for so long."""
        now = self._clock()
        length = MIN_BLOCKS
        while length <= len(names):
            block = short_hash(names[length - 1])
            demand = self._demands.pop(block, None) or _Demand(names[:length], now)
            demand.add(busy_s, now)
            self._demands[block] = demand
            length *= 2
        while len(self._demands) > MAX_TRACKED:
            del self._demands[next(iter(self._demands))]

    def assign(
        self, backlog_s: Callable[[WorkerId], float], workers: Collection[WorkerId]
    ) -> list[Assignment]:
        """Who of `workers`, those that serve and fetch blocks, is to fetch what now."""
        now = self._clock()
        hot = self._hot(now)
        wanted_beyond: dict[BlockHash, float] = {}
        """By the last block of a prefix: the most that a longer one of the hot ones is wanted."""
        for demand, num_workers in hot:
            length = MIN_BLOCKS
            while length < len(demand.names):
                last = demand.names[length - 1]
                wanted_beyond[last] = max(wanted_beyond.get(last, 0.0), num_workers)
                length *= 2
        assignments: list[Assignment] = []
        for demand, num_workers in hot:
            if wanted_beyond.get(demand.names[-1], 0.0) >= MOST * num_workers:
                continue
            if now < demand.not_before:
                continue
            holders = self._holders(demand, workers)
            others = sorted((backlog_s(w), w) for w in workers if w not in holders)
            if not holders or not others or num_workers <= LOAD * len(holders):
                continue
            demand.not_before = now + PAUSE_S
            assignments.append(Assignment(others[0][1], demand.names, holders))
        return assignments

    def rescue(
        self,
        backlog_s: Callable[[WorkerId], float],
        workers: Collection[WorkerId],
        leaving: Collection[WorkerId],
    ) -> list[Assignment]:
        """Who of `workers` is to fetch what only those that are `leaving` hold.

        What was asked for last comes first; each prefix as long as it is known, without the shorter
        ones in it.
        """
        targets = sorted(workers, key=lambda worker: (backlog_s(worker), worker))
        if not targets or not leaving:
            return []
        now = self._clock()
        recent = list(islice(reversed(self._demands.values()), MAX_RESCUE_LOOKUPS))
        recent.sort(key=lambda demand: -len(demand.names))
        rescued: list[Assignment] = []
        for demand in recent:
            if len(rescued) == MAX_RESCUED:
                break
            holders = self._holders(demand, [*workers, *leaving])
            if not holders or now < demand.not_before or any(w in workers for w in holders):
                continue
            demand.not_before = now + PAUSE_S
            if any(a.names[: len(demand.names)] == demand.names for a in rescued):
                continue
            # Dealt out, so that no single one has to evict for all of them.
            target = targets[len(rescued) % len(targets)]
            rescued.append(Assignment(target, demand.names, holders))
        return rescued

    def _hot(self, now: float) -> list[tuple[_Demand, float]]:
        """What several want, and keeps more than `LOAD` workers busy; the shortest first."""
        hot: list[tuple[_Demand, float]] = []
        for demand in reversed(self._demands.values()):
            if now - demand.at > FORGOTTEN_S:
                break
            if demand.busy_s <= _LEAST_BUSY_S:
                continue
            num_workers = demand.workers(now)
            if num_workers > LOAD and demand.num_requests(now) >= SEVERAL:
                hot.append((demand, num_workers))
        hot.sort(key=lambda item: len(item[0].names))
        return hot

    def _holders(self, demand: _Demand, workers: Collection[WorkerId]) -> list[WorkerId]:
        hashes = [short_hash(name) for name in demand.names]
        held = self._index.match(hashes)
        return sorted(
            w for w, counts in held.items() if sum(counts) == len(hashes) and w in workers
        )


def _fade(seconds: float) -> float:
    return math.exp(-math.log(2) * seconds / HALF_LIFE_S)
