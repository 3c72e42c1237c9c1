"""CAR: the worker with the least estimated time to first token. Pure.

What an estimate is made of is in `cost_model.py`; all of it is in seconds, so load needs no gate
of its own: a backlog is in the unit of the compute that a prefix saves. Rules:

 1. Only the unbroken prefix counts, per worker, in whichever tiers hold it.
 2. A prompt counts as held by its worker from dispatch until `CREDIT_S` after its first token, so
    that a burst with one new prefix follows the first of it. By then its events are in the index.
 3. Costs that differ by less than `TIE_S` are ties, which go by rendezvous hash, so that masters
    agree (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998). What is
    hashed is the first block that the worker lacks: prompts that share only a system prompt spread
    over the cluster, prompts that share more meet.
 4. A worker that has measured nothing is taken for one like the others, and one without events
    for one that holds nothing.

Not here: which workers may be asked (`registry.py`), what etcd says (`index_view.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode
from xllm.cache.index import CacheIndex, TierCounts
from xllm.protocol import WorkerId, WorkerLoad
from xllm.roles.cost_model import DEFAULT_COST, Parts, RawParts, ReuseMeter, WorkerView, cost_s
from xllm.roles.global_scheduler import Candidate

CREDIT_S = 2.0
TIE_S = 1e-3

_NO_BLOCKS: TierCounts = [0, 0, 0, 0]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a route depends on."""

    request_id: str
    hashes: Sequence[int]
    """Of its full blocks: `event_codec.short_hashes`."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Blocks [first, first + count) of the prompt are to come from a peer."""

    worker_id: WorkerId
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one worker would cost, and why."""

    worker_id: WorkerId
    prefix: TierCounts
    parts: Parts
    fetch: Fetch | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an estimate; the difference is the error of that worker's metric."""

    worker_id: WorkerId
    estimated_s: float
    measured_s: float


class CostRouting:
    """Estimates and chooses, for the workers of one model. `clock` is monotonic, in seconds.

    For each request: `route` or `explain`, then `dispatched` if it was sent, `first_token` when
    that comes, and `ended` in any case. `report` takes each load report.
    """

    def __init__(self, index: CacheIndex, block_size: int, clock: Callable[[], float]) -> None:
        self._index = index
        self._block_size = block_size
        self._clock = clock
        self._views: dict[WorkerId, WorkerView] = {}
        self._dispatches: dict[str, tuple[Estimate, float]] = {}
        self._credits = _Credits()
        self._reuse = ReuseMeter()
        self._average = DEFAULT_COST

    def report(self, worker: WorkerId, load: WorkerLoad, num_unacknowledged: int = 0) -> None:
        """A load report has come; the last `num_unacknowledged` dispatches are not in it."""
        if load.prefill_cost is not None:
            self._average = load.prefill_cost
        view = self._view(worker)
        view.report(
            load, num_unacknowledged, self._clock(), self._average, self._block_size, self._reuse
        )

    def forget(self, worker: WorkerId) -> None:
        """The worker is gone; its requests are ended by whoever runs them."""
        self._views.pop(worker, None)

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Estimate:
        """The best of `candidates`, which are not empty; the prompt has at least one token."""
        self._reuse.observe(prompt.hashes, self._clock())
        return self._choose(prompt, candidates)[0]

    def explain(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Estimate]:
        """All estimates, the one that `route` would give first; changes nothing."""
        self._credits.drop_expired(self._clock())
        best, held, all_parts = self._choose(prompt, candidates)
        rest = [
            Estimate(candidate.worker_id, held.get(candidate.worker_id, _NO_BLOCKS), Parts(*parts))
            for candidate, parts in zip(candidates, all_parts, strict=True)
            if candidate.worker_id != best.worker_id
        ]
        return [best, *sorted(rest, key=lambda estimate: estimate.parts.cost_s)]

    def dispatched(self, prompt: Prompt, estimate: Estimate) -> None:
        """The request was sent to the estimate's worker."""
        now = self._clock()
        # Here rather than in `route`, where somebody waits for the answer.
        self._credits.drop_expired(now)
        self._view(estimate.worker_id).dispatch(estimate.parts.computing_s, now)
        self._dispatches[prompt.request_id] = (estimate, now)
        self._credits.add(prompt.request_id, estimate.worker_id, prompt.hashes)

    def first_token(self, request_id: str) -> Outcome | None:
        """Its first token has come; None for a request that waits for none."""
        dispatch = self._dispatches.pop(request_id, None)
        if dispatch is None:
            return None
        estimate, at = dispatch
        now = self._clock()
        self._credits.expire(request_id, now + CREDIT_S)
        return Outcome(estimate.worker_id, estimate.parts.ttft_s, now - at)

    def ended(self, request_id: str) -> None:
        """It ended, however; without a first token, nothing is left of it."""
        if self._dispatches.pop(request_id, None) is not None:
            self._credits.expire(request_id, self._clock())

    def _view(self, worker: WorkerId) -> WorkerView:
        view = self._views.get(worker)
        if view is None:
            view = self._views[worker] = WorkerView(worker, self._clock())
            view.cost = self._average
        return view

    def _choose(
        self, prompt: Prompt, candidates: Sequence[Candidate]
    ) -> tuple[Estimate, dict[WorkerId, TierCounts], list[RawParts]]:
        """The best one, what everybody holds, and the parts of all candidates, for `explain`."""
        now = self._clock()
        hashes, num_tokens, block_size = prompt.hashes, prompt.num_tokens, self._block_size
        num_blocks = len(hashes)
        held = self._held(hashes)
        views = [self._views.get(c.worker_id) or self._view(c.worker_id) for c in candidates]
        prefixes = [held.get(c.worker_id, _NO_BLOCKS) for c in candidates]
        longest = max(map(sum, prefixes)) if held else 0
        all_parts = [
            view.parts(prefix, longest, num_blocks, block_size, num_tokens, now)
            for view, prefix in zip(views, prefixes, strict=True)
        ]
        costs = list(map(cost_s, all_parts))
        limit = min(costs) + TIE_S
        ties = [i for i, cost in enumerate(costs) if cost <= limit]
        best = ties[0]
        if len(ties) > 1:
            best = max(ties, key=lambda i: (views[i].rank(_lacking(hashes, prefixes[i])), i))
        parts = Parts(*all_parts[best])
        fetch = None
        if parts.num_fetched:
            holders = [i for i, prefix in enumerate(prefixes) if sum(prefix) == longest]
            peer = min(holders, key=lambda i: (views[i].backlog_s(now), i))
            first = longest - parts.num_fetched
            fetch = Fetch(candidates[peer].worker_id, first, parts.num_fetched)
        estimate = Estimate(candidates[best].worker_id, prefixes[best], parts, fetch)
        return estimate, held, all_parts

    def _held(self, hashes: Sequence[int]) -> dict[WorkerId, TierCounts]:
        held = self._index.match(hashes)
        for worker, counts in self._credits.match(hashes).items():
            if worker not in held or sum(counts) > sum(held[worker]):
                held[worker] = counts
        return held


def _lacking(hashes: Sequence[int], prefix: TierCounts) -> int:
    """The first block of a prompt beyond what a worker holds."""
    num_held = sum(prefix)
    return hashes[num_held] if num_held < len(hashes) else 0


class _Credits:
    """What dispatched prompts will leave behind, as if it were there already."""

    def __init__(self) -> None:
        self._index = CacheIndex()
        self._prompts: dict[str, tuple[WorkerId, Sequence[int]]] = {}
        self._counts: dict[WorkerId, dict[int, int]] = {}
        """How many prompts of a worker vouch for a block."""
        self._expiries: list[tuple[float, str]] = []
        """A heap."""

    def add(self, request_id: str, worker: WorkerId, hashes: Sequence[int]) -> None:
        self._drop(request_id)
        self._prompts[request_id] = (worker, hashes)
        counts = self._counts.setdefault(worker, {})
        fresh = [block for block in hashes if block not in counts]
        for block in hashes:
            counts[block] = counts.get(block, 0) + 1
        self._index.apply(worker, _device(BlockEventKind.STORED, fresh))

    def expire(self, request_id: str, at: float) -> None:
        heapq.heappush(self._expiries, (at, request_id))

    def drop_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            self._drop(heapq.heappop(self._expiries)[1])

    def match(self, hashes: Sequence[int]) -> dict[WorkerId, TierCounts]:
        return self._index.match(hashes)

    def _drop(self, request_id: str) -> None:
        worker, hashes = self._prompts.pop(request_id, (WorkerId(""), ()))
        if not hashes:
            return
        counts = self._counts[worker]
        gone = []
        for block in hashes:
            counts[block] -= 1
            if not counts[block]:
                del counts[block]
                gone.append(block)
        self._index.apply(worker, _device(BlockEventKind.REMOVED, gone))
        if not counts:
            del self._counts[worker]
            self._index.remove_worker(worker)


def _device(kind: BlockEventKind, hashes: Sequence[int]) -> EventBatch:
    return EventBatch((Section(TierCode.DEVICE, kind, hashes),))
