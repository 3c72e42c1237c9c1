"""CAR: the worker with the least estimated time to first token. Pure.

What an estimate is made of is in `cost_model.py`; all of it is in seconds, so load needs no gate
of its own: a backlog is in the unit of the compute that a prefix saves. Rules:

 1. Only the unbroken prefix counts, per worker, in whichever tiers hold it.
 2. A prompt counts as held by its worker from dispatch until `CREDIT_S` after its first token, so
    that a burst with one new prefix follows the first of it. By then its events are in the index.
 3. Costs that differ by less than `TIE_S` are ties, which go by rendezvous hash, so that masters
    agree (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998). What is
    hashed is the first block that the worker lacks: prompts that share only a system prompt spread
    over the cluster, prompts that share more meet. Where nothing is lacking, the fewest requests.
 4. Blocks of the shared store are near every worker that uses it: of each, the prefix goes on there
    where its own blocks end, as far as the store's go without a gap, unless a peer that has these
    blocks is quicker.
 5. A worker that has measured nothing is taken for one like the others, and one without events
    for one that holds nothing. Workers whose costs differ by no more than noise are equal.

Not here: which workers may be asked (`registry.py`), what etcd says (`index_view.py`).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from xllm.cache.index import CacheIndex, TierCounts
from xllm.protocol import WorkerId, WorkerLoad
from xllm.roles.cost_model import (
    DEFAULT_COST,
    CostKind,
    Parts,
    RawParts,
    ReuseMeter,
    WorkerView,
    computing_s,
    cost_s,
    measured_cost,
)
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
    weighed: _Weighed | None = field(default=None, repr=False, compare=False)

    def alternatives(self, max_num: int) -> list[Estimate]:
        """This one and the best of those that it was compared with: made when asked for."""
        if self.weighed is None:
            return [self]
        best = self.weighed.all(max_num)
        return [self, *(e for e in best if e.worker_id != self.worker_id)][:max_num]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a worker has to be able to keep to be chosen, in seconds."""

    ttft_s: float
    tpot_s: float


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
        self._kinds = [CostKind(DEFAULT_COST)]
        """The first one: of workers that have measured nothing, while nobody has."""

    def report(self, worker: WorkerId, load: WorkerLoad, num_unacknowledged: int = 0) -> None:
        """A load report has come; the last `num_unacknowledged` dispatches are not in it."""
        view = self._view(worker)
        kind = self._kind_of(view, load)
        now = self._clock()
        view.report(load, num_unacknowledged, now, kind, self._block_size, self._reuse)

    def forget(self, worker: WorkerId) -> None:
        """The worker is gone; its requests are ended by whoever runs them."""
        self._views.pop(worker, None)

    def route(
        self,
        prompt: Prompt,
        candidates: Sequence[Candidate],
        peers: Container[WorkerId] | None = None,
    ) -> Estimate:
        """The best of `candidates`, which are not empty; the prompt has at least one token.

        `peers`: who may be fetched from; None: everybody.
        """
        self._reuse.observe(prompt.hashes, self._clock())
        return self._weigh(prompt, candidates, peers).best()

    def route_in_time(
        self,
        prompt: Prompt,
        candidates: Sequence[Candidate],
        targets: Targets,
        peers: Container[WorkerId] | None = None,
    ) -> Estimate | None:
        """As `route`, among those that keep `targets`; None: nobody does."""
        weighed = self._weigh(prompt, candidates, peers)
        if not weighed.keep(targets):
            return None
        self._reuse.observe(prompt.hashes, self._clock())
        return weighed.best()

    def explain(
        self,
        prompt: Prompt,
        candidates: Sequence[Candidate],
        peers: Container[WorkerId] | None = None,
    ) -> list[Estimate]:
        """All estimates, the one that `route` would give first; changes nothing."""
        self._credits.drop_expired(self._clock())
        return self._weigh(prompt, candidates, peers).all()

    def tpot_s(self, worker: WorkerId) -> float:
        """`WorkerView.tpot_s`."""
        return self._view(worker).tpot_s

    def token_s(self, worker: WorkerId) -> float:
        """Of a worker's step, what one token in it adds."""
        return self._view(worker).kind.cost.token_s

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
            view = self._views[worker] = WorkerView(worker, self._kinds[-1], self._clock())
        return view

    def _kind_of(self, view: WorkerView, load: WorkerLoad) -> CostKind:
        cost = measured_cost(load)
        if cost is None:
            return self._kinds[-1]
        if view.load is None or view.kind is self._kinds[0] or not view.kind.matches(cost):
            used = {id(other.kind) for other in self._views.values()}
            self._kinds[1:] = [kind for kind in self._kinds[1:] if id(kind) in used]
            matching = (kind for kind in self._kinds[1:] if kind.matches(cost))
            kind = next(matching, None)
            if kind is None:
                kind = CostKind(cost)
                self._kinds.append(kind)
            return kind
        view.kind.add(cost)
        return view.kind

    def _weigh(
        self,
        prompt: Prompt,
        candidates: Sequence[Candidate],
        peers: Container[WorkerId] | None,
    ) -> _Weighed:
        now = self._clock()
        hashes, num_tokens, block_size = prompt.hashes, prompt.num_tokens, self._block_size
        num_blocks = len(hashes)
        published = self._index.match(hashes)
        held = self._with_credits(published, hashes)
        # What somebody is only about to compute cannot be fetched yet.
        sizes = {w: sum(counts) for w, counts in published.items() if peers is None or w in peers}
        longest = max(sizes.values(), default=0)
        views = [self._views.get(c.worker_id) or self._view(c.worker_id) for c in candidates]
        prefixes = [held.get(c.worker_id, _NO_BLOCKS) for c in candidates]
        # Workers of one kind that hold equally much, as most do, take equally long.
        computing: dict[tuple[CostKind, int], tuple[float, float]] = {}

        def parts_of(candidate: Candidate, view: WorkerView, prefix: TierCounts) -> RawParts:
            num_held = 0 if prefix is _NO_BLOCKS else sum(prefix)
            key = (view.kind, num_held)
            both_s = computing.get(key)
            if both_s is None:
                cost = view.kind.cost
                both_s = computing[key] = (
                    computing_s(cost, num_held * block_size, num_tokens),
                    computing_s(cost, longest * block_size, num_tokens),
                )
            num_more = candidate.unreported
            return view.parts(prefix, num_held, both_s, longest, num_blocks, num_more, now)

        all_parts = list(map(parts_of, candidates, views, prefixes))
        gaps = self._index.store_gaps(hashes)
        for i, view in enumerate(views if gaps is not None else ()):
            assert gaps is not None
            with_store = _with_store(prefixes[i], gaps, num_blocks) if view.has_store else None
            if with_store is not None:
                parts = parts_of(candidates[i], view, with_store)
                if cost_s(parts) <= cost_s(all_parts[i]):  # which keeps no peer busy
                    prefixes[i], all_parts[i] = with_store, parts
        sources: list[tuple[float, WorkerId]] = []
        if any(parts[-1] for parts in all_parts):
            sources = [
                (self._view(worker).backlog_s(now), worker)
                for worker, size in sizes.items()
                if size == longest
            ]
        return _Weighed(hashes, candidates, views, prefixes, all_parts, longest, sources)

    def _with_credits(
        self, published: dict[WorkerId, TierCounts], hashes: Sequence[int]
    ) -> dict[WorkerId, TierCounts]:
        credits = self._credits.match(hashes)
        if not credits:
            return published
        held = dict(published)
        for worker, counts in credits.items():
            if worker not in held or sum(counts) > sum(held[worker]):
                held[worker] = counts
        return held


class _Weighed:
    """One prompt on each of the candidates."""

    __slots__ = (
        "_candidates",
        "_costs",
        "_hashes",
        "_longest",
        "_parts",
        "_prefixes",
        "_sources",
        "_views",
    )

    def __init__(
        self,
        hashes: Sequence[int],
        candidates: Sequence[Candidate],
        views: list[WorkerView],
        prefixes: list[TierCounts],
        all_parts: list[RawParts],
        longest: int,
        sources: list[tuple[float, WorkerId]],
    ) -> None:
        """`sources`: backlog and name of the peers that hold the `longest` prefix."""
        self._hashes = hashes
        self._candidates = candidates
        self._views = views
        self._prefixes = prefixes
        self._parts = all_parts
        self._longest = longest
        self._sources = sources
        self._costs = list(map(cost_s, all_parts))

    def keep(self, targets: Targets) -> bool:
        """Leaves those that keep `targets`; whether there are any."""
        for i, (view, parts) in enumerate(zip(self._views, self._parts, strict=True)):
            if Parts(*parts).ttft_s > targets.ttft_s or view.tpot_s > targets.tpot_s:
                self._costs[i] = math.inf
        return min(self._costs) < math.inf

    def best(self) -> Estimate:
        return self._estimate(self._best())

    def all(self, max_num: int | None = None) -> list[Estimate]:
        """The best one first."""
        best = self._best()
        rest = [i for i in range(len(self._parts)) if i != best]
        rest.sort(key=self._costs.__getitem__)
        return [self._estimate(i) for i in (best, *rest)[:max_num]]

    def _best(self) -> int:
        limit = min(self._costs) + TIE_S
        ties = [i for i, cost in enumerate(self._costs) if cost <= limit]
        if len(ties) == 1:
            return ties[0]
        lacking = [(i, _lacking(self._hashes, self._prefixes[i])) for i in ties]
        if all(block is None for _, block in lacking):
            # Nothing new is stored, so there is nothing to agree on.
            return min(ties, key=lambda i: (self._candidates[i].num_requests, i))
        ranks = [(self._views[i].rank(block or 0), i) for i, block in lacking]
        return max(ranks)[1]

    def _estimate(self, i: int) -> Estimate:
        parts = Parts(*self._parts[i])
        fetch = None
        if parts.num_fetched:
            # The longest prefix that anybody holds ends where what is fetched ends.
            _, peer = min(self._sources)
            fetch = Fetch(peer, self._longest - parts.num_fetched, parts.num_fetched)
        return Estimate(self._views[i].worker_id, self._prefixes[i], parts, fetch, self)


def _with_store(prefix: TierCounts, gaps: list[int], num_blocks: int) -> TierCounts | None:
    """`prefix`, going on in the shared store; None: it does not. gaps: `CacheIndex.store_gaps`."""
    end = sum(prefix)
    next_gap = bisect_left(gaps, end)
    store_end = gaps[next_gap] if next_gap < len(gaps) else num_blocks
    return [*prefix[:-1], store_end - end] if store_end > end else None


def _lacking(hashes: Sequence[int], prefix: TierCounts) -> int | None:
    """The first block of a prompt beyond what a worker holds, if there is one."""
    num_held = sum(prefix)
    return hashes[num_held] if num_held < len(hashes) else None


class _Mark:
    """Of one worker's prompts, those that have one block in common."""

    __slots__ = ("count", "hashes")

    def __init__(self, hashes: Sequence[int]) -> None:
        self.count = 1
        self.hashes = hashes
        """Of the last one."""


class _Credits:
    """What dispatched prompts will leave behind, as if it were there already.

    The name of a block stands for all blocks before it, so every eighth one is enough to find the
    workers whose prompts begin alike; the last of these prompts says how far.
    """

    STRIDE = 8

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[WorkerId, Sequence[int]]] = {}
        self._marks: dict[int, dict[WorkerId, _Mark]] = {}
        self._expiries: list[tuple[float, str]] = []
        """A heap."""

    def add(self, request_id: str, worker: WorkerId, hashes: Sequence[int]) -> None:
        self._drop(request_id)
        self._prompts[request_id] = (worker, hashes)
        for block in hashes[:: self.STRIDE]:
            marks = self._marks.setdefault(block, {})
            mark = marks.get(worker)
            if mark is None:
                marks[worker] = _Mark(hashes)
            else:
                mark.count += 1
                mark.hashes = hashes

    def expire(self, request_id: str, at: float) -> None:
        heapq.heappush(self._expiries, (at, request_id))

    def drop_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            self._drop(heapq.heappop(self._expiries)[1])

    def match(self, hashes: Sequence[int]) -> dict[WorkerId, TierCounts]:
        """As `CacheIndex.match`, all of it in the device tier."""
        found: list[dict[WorkerId, _Mark]] = []
        for block in hashes[:: self.STRIDE]:
            marks = self._marks.get(block)
            if marks is None:
                break
            found.append(marks)
        counts: dict[WorkerId, TierCounts] = {}
        while found:
            marks = found.pop()
            start = len(found) * self.STRIDE
            ours = hashes[start : start + self.STRIDE]
            for worker, mark in marks.items():
                if worker not in counts:
                    theirs = mark.hashes[start : start + self.STRIDE]
                    counts[worker] = [start + _num_common(ours, theirs), 0, 0, 0]
        return counts

    def _drop(self, request_id: str) -> None:
        worker, hashes = self._prompts.pop(request_id, (WorkerId(""), ()))
        for block in hashes[:: self.STRIDE]:
            marks = self._marks[block]
            marks[worker].count -= 1
            if not marks[worker].count:
                del marks[worker]
                if not marks:
                    del self._marks[block]


def _num_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    if ours == theirs:
        return len(ours)
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    )
