"""What a prompt would cost on a worker, from what the worker measured on itself. Pure.

    ttft = max(backlog, loading + fetching) + computing

    backlog      what was reported, and sent since, less the time that has passed
    loading      blocks below device, each at the rate of its tier, or of computing if that is less
    fetching     blocks that only a peer has, if that is quicker than computing them
    computing    the rest of the prompt, slowed down by the decodes in the same steps

Loading goes on while others are computed, so it hides behind the backlog.

What is minimised adds what the prompt takes from others: the time that they wait while it is
computed, and

    displacing   what computing again would cost for the blocks that this prompt evicts

A block that is stored evicts another, and someone may come back for that one. Without this term, a
short shared prefix attracts everything to the few workers that hold it, while the memory of others
stays empty; with it, workers evict blocks of about the same age, as one pool would. From a tier
that has another below it, an eviction costs only the slower load.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

from xllm.cache.event_codec import TierCode
from xllm.cache.index import TierCounts
from xllm.protocol import PEER, PrefillCost, WorkerId, WorkerLoad

MAX_STEP_S = 0.08
"""Of a step with decodes in it: the chunk of a prompt gets what they leave."""

MIN_PREFILL_SHARE = 0.25

WAITING_FACTOR = 2.5
"""What others wait for each second that a worker computes, in seconds: so many requests come to it
meanwhile. Least of its own TTFT alone sends a prompt past a queue to be computed a second time,
whose cost the ones behind it bear. Replaying the conversation trace on 8 workers, reuse of what one
pooled cache would reach and the mean TTFT: 0.89 with 0; 0.947 and 0.542 s with 1.5; 0.952
and 0.546 s with 2; 0.964 and 0.556 s with 3."""

DEFAULT_COST = PrefillCost(0.0, 1e-3, 0.0)
"""As long as no worker has measured anything: all are equal then."""

_TIERS = [tier.name.lower() for tier in TierCode]
_MAX_UNACKNOWLEDGED = 4096
_SCATTER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class CostKind:
    """Workers that compute at about the same cost, and that cost.

    Each worker's own figures are noisy. Taken as they are, every new prompt of an idle cluster
    would go to whichever worker measured best last, and masters would not agree on who that is.
    """

    __slots__ = ("cost",)

    NOISE = 1.3
    """What differs by a smaller factor is the same."""
    WEIGHT = 1 / 16
    """Of one report in the common cost."""

    def __init__(self, cost: PrefillCost) -> None:
        self.cost = cost

    def matches(self, cost: PrefillCost) -> bool:
        """Whether a short and a long prompt both cost about the same."""
        for num_tokens in (512, 8192):
            mine, other = self.cost.seconds(0, num_tokens), cost.seconds(0, num_tokens)
            if max(mine, other) > self.NOISE * min(mine, other):
                return False
        return True

    def add(self, cost: PrefillCost) -> None:
        old, weight = self.cost, self.WEIGHT
        self.cost = PrefillCost(
            old.step_s + weight * (cost.step_s - old.step_s),
            old.token_s + weight * (cost.token_s - old.token_s),
            old.pair_s + weight * (cost.pair_s - old.pair_s),
        )


class Parts(NamedTuple):
    """Of one worker's estimate, in seconds; `num_fetched` in blocks."""

    backlog_s: float
    loading_s: float
    fetching_s: float
    computing_s: float
    displacing_s: float
    num_fetched: int

    @property
    def ttft_s(self) -> float:
        return max(self.backlog_s, self.loading_s + self.fetching_s) + self.computing_s

    @property
    def cost_s(self) -> float:
        """What is minimised: the request's own time, and what it takes from others."""
        return cost_s(self)


RawParts: TypeAlias = tuple[float, float, float, float, float, int]
"""The fields of `Parts`: a route makes them for every worker, and a NamedTuple costs five times as
much."""


def cost_s(parts: RawParts) -> float:
    """`Parts.cost_s`."""
    backlog_s, loading_s, fetching_s, computing_s, displacing_s, _ = parts
    loading_s += fetching_s
    return (backlog_s if backlog_s > loading_s else loading_s) + (1.0 + WAITING_FACTOR) * (
        computing_s + displacing_s
    )


def computing_s(cost: PrefillCost, start: int, num_tokens: int) -> float:
    """Of a prompt whose first `start` tokens are held: at least the last one is computed."""
    if start >= num_tokens:
        start = num_tokens - 1
    return cost.seconds(start, num_tokens - start)


class WorkerView:
    """What a master knows of one worker's costs and of its queue.

    Between reports, the queue is a fluid: dispatches fill it, time drains it.
    """

    __slots__ = (
        "_at",
        "_backlog_s",
        "_sent",
        "_slowdown",
        "displace_block_s",
        "key",
        "kind",
        "load",
        "load_block_s",
        "peer_block_s",
        "worker_id",
    )

    def __init__(self, worker_id: WorkerId, kind: CostKind, now: float) -> None:
        self.kind = kind
        self.worker_id = worker_id
        digest = blake2b(worker_id.encode(), digest_size=8).digest()
        self.key = int.from_bytes(digest, "little")
        self.load: WorkerLoad | None = None
        self._slowdown = 1.0
        self.load_block_s: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
        self.peer_block_s = math.inf
        self.displace_block_s = 0.0
        self._backlog_s = 0.0
        self._at = now
        self._sent: deque[float] = deque(maxlen=_MAX_UNACKNOWLEDGED)
        """Seconds of each dispatch that no report has acknowledged."""

    def report(
        self,
        load: WorkerLoad,
        num_unacknowledged: int,
        now: float,
        kind: CostKind,
        block_size: int,
        reuse: ReuseMeter,
    ) -> None:
        self.load = load
        self.kind = kind
        self._slowdown = _slowdown(load.decode_step_s) if load.running_requests_num else 1.0
        compute_block_s = self.kind.cost.token_s * block_size
        known = [load.tier_block_s.get(tier, math.inf) for tier in _TIERS[1:]]
        self.load_block_s = (0.0, *(min(block_s, compute_block_s) for block_s in known))
        self.peer_block_s = load.tier_block_s.get(PEER, math.inf)
        self.displace_block_s = self._displace_block_s(load, compute_block_s, reuse)
        while len(self._sent) > num_unacknowledged:
            self._sent.popleft()
        queue_s = load.queue_s or load.waiting_tokens_num * self.kind.cost.token_s
        self._backlog_s = queue_s + sum(self._sent)
        self._at = now

    @property
    def has_store(self) -> bool:
        """It can load from the shared store now."""
        return self.load is not None and _TIERS[TierCode.REMOTE] in self.load.tier_block_s

    @property
    def tpot_s(self) -> float:
        """Of one sequence more."""
        return self._step_s(1) if self.load is not None else 0.0

    def slowdown_with(self, num_more: int) -> float:
        """What a second of computing takes beside the decodes that were reported, and so many."""
        return self._slowdown if num_more <= 0 else _slowdown(self._step_s(num_more))

    def _step_s(self, num_more: int) -> float:
        """Of a step that decodes what was reported, and so many sequences more."""
        reported_s = self.load.decode_step_s if self.load is not None else 0.0
        return max(reported_s, self.kind.cost.step_s) + num_more * self.kind.cost.token_s

    def rank(self, block: int) -> int:
        """Where this worker stands in the order that all masters give workers for a block."""
        return ((block ^ self.key) * _SCATTER & _MASK) >> 16

    def dispatch(self, computing_s: float, now: float) -> None:
        self._backlog_s = self.backlog_s(now) + computing_s
        self._at = now
        self._sent.append(computing_s)

    def backlog_s(self, now: float) -> float:
        return max(0.0, self._backlog_s - (now - self._at))

    def parts(
        self,
        prefix: TierCounts,
        num_held: int,
        computing: tuple[float, float],
        longest: int,
        num_blocks: int,
        num_more: int,
        now: float,
    ) -> RawParts:
        """The fields of `Parts`. `num_held`: the sum of `prefix`; `computing`: what this kind of
        worker takes for all behind these blocks, and for all behind the `longest` prefix that may
        be fetched; `num_more`: requests that are there beyond the reported ones."""
        computing_s, shorter_s = computing
        loading_s = 0.0
        device = prefix[0]
        if num_held > device:
            _, host_s, disk_s, remote_s = self.load_block_s
            loading_s = prefix[1] * host_s + prefix[2] * disk_s + prefix[3] * remote_s
        slowdown = self._slowdown if num_more <= 0 else self.slowdown_with(num_more)
        computing_s *= slowdown
        fetching_s = 0.0
        num_fetched = 0
        if longest > num_held and self.peer_block_s < math.inf:
            shorter_s *= slowdown
            to_fetch_s = (longest - num_held) * self.peer_block_s
            if to_fetch_s + shorter_s < computing_s:
                computing_s, fetching_s = shorter_s, to_fetch_s
                num_fetched = longest - num_held
        backlog_s = self._backlog_s - (now - self._at)
        return (
            backlog_s if backlog_s > 0.0 else 0.0,
            loading_s,
            fetching_s,
            computing_s,
            (num_blocks - device) * self.displace_block_s,
            num_fetched,
        )

    def _displace_block_s(
        self, load: WorkerLoad, compute_block_s: float, reuse: ReuseMeter
    ) -> float:
        """What storing one block is expected to cost later: each full tier on the way down passes
        its oldest block on to the next one."""
        ages = load.eviction_age_s
        lost_s = 0.0
        have_s = 0.0
        tiers = [tier for tier in _TIERS if tier == _TIERS[0] or tier in load.tier_block_s]
        for tier, below in zip(tiers, [*tiers[1:], None], strict=True):
            if tier not in ages:
                break
            next_s = compute_block_s
            if below is not None:
                next_s = min(load.tier_block_s[below], compute_block_s)
            lost_s += reuse.chance(ages[tier]) * (next_s - have_s)
            have_s = next_s
        return lost_s


class ReuseMeter:
    """How likely a block is used again that has rested for some time already.

    Counts, over a sample of the blocks of all prompts, the rests between two uses, in classes of
    doubling length. What happened long ago fades.
    """

    NUM_CLASSES = 20
    SAMPLED = 16
    """One of so many blocks."""
    MAX_TRACKED = 1 << 16
    MAX_COUNT = 1 << 16

    def __init__(self) -> None:
        self._used_at: dict[int, float] = {}
        """By block, the longest ago first."""
        self._rests = [0.0] * self.NUM_CLASSES
        self._num_uses = 0.0

    def observe(self, hashes: Sequence[int], now: float) -> None:
        """A prompt with these blocks was seen."""
        used_at = self._used_at
        for block in [block for block in hashes if not block % self.SAMPLED]:
            before = used_at.pop(block, None)
            used_at[block] = now
            self._num_uses += 1
            if before is not None:
                self._rests[self._class(now - before)] += 1
            elif len(used_at) > self.MAX_TRACKED:
                del used_at[next(iter(used_at))]
        if self._num_uses > self.MAX_COUNT:
            self._num_uses /= 2
            self._rests = [count / 2 for count in self._rests]

    def chance(self, age_s: float) -> float:
        """That a block which was not used for `age_s` will be used again."""
        age_class = self._class(age_s)
        shorter = sum(self._rests[:age_class])
        longer = sum(self._rests[age_class:])
        # Within a class, rests are taken to be spread evenly over its logarithm.
        inside = self._rests[age_class] * max(0.0, math.log2(age_s + 1) - age_class)
        rested = self._num_uses - shorter - inside
        return max(0.0, longer - inside) / rested if rested > 0 else 0.0

    def _class(self, rest_s: float) -> int:
        return min(int(math.log2(rest_s + 1)), self.NUM_CLASSES - 1)


def _slowdown(step_s: float) -> float:
    return 1.0 / max(1.0 - step_s / MAX_STEP_S, MIN_PREFILL_SHARE)


def measured_cost(load: WorkerLoad) -> PrefillCost | None:
    """As far as the worker knows its own."""
    if load.prefill_cost is not None:
        return load.prefill_cost
    rate = load.prefill_tokens_per_s
    return PrefillCost(0.0, 1 / rate, 0.0) if rate else None
