"""What is compared. Every policy sees the same index, reports and dispatches of one master.

The formulas of others are as their routers compute them, on exact counts where those routers only
estimate, so that what differs is the formula:

    xLLM      most of matched / total - cache usage - waiting / max waiting
    Dynamo    least of max(active prefill + prompt - credit, 0) + active decode, in blocks;
              a matched block credits 1 on device, 0.75 in host memory, 0.25 on disk
    llm-d     3 x prefix + 2 x queue + 2 x free memory, each from 0 to 1; a block of the unbroken
              prefix counts 1 on device, 0.8 below; a routed prompt counts as cached for 2 s. (On
              the prefix alone, one worker gets every prompt that begins with the system prompt.)
    sglang    shortest queue if max - min > 64 and max > 1.5 min; else the best match if it is over
              0.3 of the prompt, else the worker that holds least
    AIBrix    fewest requests if max - min > 16; else the best match among those with at most
              mean + 2 sigma requests
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from statistics import fmean, pstdev
from typing import Protocol

from xllm.cache.index import CacheIndex, TierCounts
from xllm.protocol import GenerateRequest, SamplingParams, WorkerId, WorkerLoad
from xllm.roles.cost_routing import CostRouting, Estimate, Fetch, Prompt
from xllm.roles.global_scheduler import Candidate, LeastLoad, RoundRobin

_NONE: TierCounts = [0, 0, 0, 0]


class Routing(Protocol):
    """What a run asks of a policy."""

    @property
    def errors(self) -> Sequence[float]:
        """Estimated TTFT less what it was, where a policy estimates it."""
        ...

    @property
    def fetch(self) -> Fetch | None:
        """What the last route would have fetched from a peer."""
        ...

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId: ...
    def dispatched(self, prompt: Prompt, worker: WorkerId) -> None: ...
    def first_token(self, request_id: str) -> None: ...
    def ended(self, request_id: str) -> None: ...
    def report(self, worker: WorkerId, load: WorkerLoad) -> None: ...


MakeRouting = Callable[[CacheIndex, int, Callable[[], float]], Routing]


class _Counting:
    """Knows what was sent, what waits for its first token, and what has ended."""

    def __init__(self, index: CacheIndex, block_size: int, clock: Callable[[], float]) -> None:
        self.index = index
        self.clock = clock
        self.errors: Sequence[float] = ()
        self.fetch: Fetch | None = None
        self.loads: dict[WorkerId, WorkerLoad] = {}
        self.num_requests: Counter[WorkerId] = Counter()
        self.prefill_blocks: Counter[WorkerId] = Counter()
        self.decode_blocks: Counter[WorkerId] = Counter()
        self._sent: dict[str, tuple[WorkerId, int, int]] = {}
        self._held: Mapping[WorkerId, TierCounts] = {}

    def dispatched(self, prompt: Prompt, worker: WorkerId) -> None:
        num_blocks = len(prompt.hashes)
        new_blocks = num_blocks - sum(self._held.get(worker, _NONE))
        self._sent[prompt.request_id] = (worker, num_blocks, new_blocks)
        self.num_requests[worker] += 1
        self.prefill_blocks[worker] += new_blocks
        self.decode_blocks[worker] += num_blocks

    def first_token(self, request_id: str) -> None:
        worker, _, new_blocks = self._sent[request_id]
        self.prefill_blocks[worker] -= new_blocks

    def ended(self, request_id: str) -> None:
        worker, num_blocks, _ = self._sent.pop(request_id)
        self.num_requests[worker] -= 1
        self.decode_blocks[worker] -= num_blocks

    def report(self, worker: WorkerId, load: WorkerLoad) -> None:
        self.loads[worker] = load

    def match(self, prompt: Prompt) -> Mapping[WorkerId, TierCounts]:
        self._held = self.index.match(prompt.hashes)
        return self._held


class RoundRobinRouting(_Counting):
    def __init__(self, index: CacheIndex, block_size: int, clock: Callable[[], float]) -> None:
        super().__init__(index, block_size, clock)
        self.policy = RoundRobin()

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        return self.policy.route(_request(prompt), candidates).worker_id


class LeastLoadRouting(_Counting):
    def __init__(self, index: CacheIndex, block_size: int, clock: Callable[[], float]) -> None:
        super().__init__(index, block_size, clock)
        self.policy = LeastLoad()

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        counted = [Candidate(c.worker_id, None, self.num_requests[c.worker_id]) for c in candidates]
        return self.policy.route(_request(prompt), counted).worker_id


class CostAwareRouting:
    """CAR."""

    def __init__(self, index: CacheIndex, block_size: int, clock: Callable[[], float]) -> None:
        self._routing = CostRouting(index, block_size, clock)
        self._chosen: Estimate | None = None
        self._unacknowledged: Counter[WorkerId] = Counter()
        self._last_report: dict[WorkerId, float] = {}
        self._dispatched_at: dict[WorkerId, deque[float]] = {}
        self._clock = clock
        self.errors: list[float] = []
        self.fetch: Fetch | None = None

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        self._chosen = self._routing.route(prompt, candidates)
        self.fetch = self._chosen.fetch
        return self._chosen.worker_id

    def dispatched(self, prompt: Prompt, worker: WorkerId) -> None:
        assert self._chosen is not None
        self._routing.dispatched(prompt, self._chosen)
        self._dispatched_at.setdefault(worker, deque(maxlen=64)).append(self._clock())

    def first_token(self, request_id: str) -> None:
        outcome = self._routing.first_token(request_id)
        assert outcome is not None
        self.errors.append(outcome.estimated_s - outcome.measured_s)

    def ended(self, request_id: str) -> None:
        self._routing.ended(request_id)

    def report(self, worker: WorkerId, load: WorkerLoad) -> None:
        # What was sent while the report was on its way is not in it.
        before = self._clock() - 0.002
        sent = reversed(self._dispatched_at.get(worker, ()))
        num_unacknowledged = sum(1 for _ in takewhile(lambda at: at > before, sent))
        self._routing.report(worker, load, num_unacknowledged)


class FetchingRouting(CostAwareRouting):
    """Another policy chooses, as `CostAware` has it: only what to fetch is estimated."""

    def __init__(
        self,
        chooser: type[RoundRobinRouting] | type[LeastLoadRouting],
        index: CacheIndex,
        block_size: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(index, block_size, clock)
        self._chooser = chooser(index, block_size, clock)

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        chosen = self._chooser.route(prompt, candidates)
        return super().route(prompt, [Candidate(chosen, None, 0)])

    def dispatched(self, prompt: Prompt, worker: WorkerId) -> None:
        super().dispatched(prompt, worker)
        self._chooser.dispatched(prompt, worker)

    def first_token(self, request_id: str) -> None:
        super().first_token(request_id)
        self._chooser.first_token(request_id)

    def ended(self, request_id: str) -> None:
        super().ended(request_id)
        self._chooser.ended(request_id)


class XllmRouting(_Counting):
    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        held = self.match(prompt)
        most = max((load.waiting_requests_num for load in self.loads.values()), default=0) or 1

        def score(candidate: Candidate) -> float:
            worker = candidate.worker_id
            matched = sum(held.get(worker, _NONE)) / max(1, len(prompt.hashes))
            load = self.loads.get(worker)
            if load is None:
                return matched
            return matched - load.gpu_cache_usage_perc - load.waiting_requests_num / most

        return max(candidates, key=score).worker_id


class DynamoRouting(_Counting):
    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        held = self.match(prompt)

        def cost(candidate: Candidate) -> float:
            worker = candidate.worker_id
            device, host, disk, _ = held.get(worker, _NONE)
            credit = device + 0.75 * host + 0.25 * disk
            prefill = self.prefill_blocks[worker] + len(prompt.hashes) - credit
            return max(prefill, 0.0) + self.decode_blocks[worker]

        return min(candidates, key=cost).worker_id


class LlmdRouting(_Counting):
    def __init__(self, index: CacheIndex, block_size: int, clock: Callable[[], float]) -> None:
        super().__init__(index, block_size, clock)
        self._routed: deque[tuple[float, WorkerId, Sequence[int]]] = deque()

    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        held = self.match(prompt)
        weights = {worker: c[0] + 0.8 * sum(c[1:]) for worker, c in held.items()}
        while self._routed and self._routed[0][0] < self.clock() - 2.0:
            self._routed.popleft()
        for _, worker, hashes in self._routed:
            common = 0
            for ours, theirs in zip(prompt.hashes, hashes, strict=False):
                if ours != theirs:
                    break
                common += 1
            weights[worker] = max(weights.get(worker, 0.0), common)
        most = max(self.num_requests.values(), default=0) or 1

        def score(candidate: Candidate) -> float:
            worker = candidate.worker_id
            load = self.loads.get(worker)
            free = 1.0 - load.gpu_cache_usage_perc if load is not None else 1.0
            prefix = weights.get(worker, 0.0) / max(1, len(prompt.hashes))
            return 3 * prefix + 2 * (1 - self.num_requests[worker] / most) + 2 * free

        chosen = max(candidates, key=score).worker_id
        self._routed.append((self.clock(), chosen, prompt.hashes))
        return chosen


class SglangRouting(_Counting):
    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        held = self.match(prompt)
        workers = [c.worker_id for c in candidates]
        counts = [self.num_requests[worker] for worker in workers]
        if max(counts) - min(counts) > 64 and max(counts) > 1.5 * min(counts):
            return workers[counts.index(min(counts))]
        best = max(workers, key=lambda worker: sum(held.get(worker, _NONE)))
        if sum(held.get(best, _NONE)) > 0.3 * len(prompt.hashes):
            return best
        return min(workers, key=lambda worker: sum(self.index.num_held(worker)))


class AibrixRouting(_Counting):
    def route(self, prompt: Prompt, candidates: Sequence[Candidate]) -> WorkerId:
        held = self.match(prompt)
        workers = [c.worker_id for c in candidates]
        counts = [self.num_requests[worker] for worker in workers]
        if max(counts) - min(counts) > 16:
            return workers[counts.index(min(counts))]
        limit = fmean(counts) + 2 * pstdev(counts)
        fits = [worker for worker in workers if self.num_requests[worker] <= limit]
        best = max(fits, key=lambda w: (sum(held.get(w, _NONE)), -self.num_requests[w]))
        return best


ROUTINGS: dict[str, MakeRouting] = {
    "RR": RoundRobinRouting,
    "LEAST_LOAD": LeastLoadRouting,
    "CAR": CostAwareRouting,
    "xLLM": XllmRouting,
    "Dynamo": DynamoRouting,
    "llm-d": LlmdRouting,
    "sglang": SglangRouting,
    "AIBrix": AibrixRouting,
}

FETCHING: dict[str, MakeRouting] = {
    "CAR+peers": CostAwareRouting,
    "RR+peers": partial(FetchingRouting, RoundRobinRouting),
    "LEAST_LOAD+peers": partial(FetchingRouting, LeastLoadRouting),
}
"""Whose workers fetch blocks from each other; the others are compared without."""


def _request(prompt: Prompt) -> GenerateRequest:
    return GenerateRequest(
        request_id=prompt.request_id, model_id="m", prompt_ids=[], sampling=SamplingParams()
    )
