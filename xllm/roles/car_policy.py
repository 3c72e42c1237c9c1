"""Requests in, routes out: the `--load_balance_policy`. Pure.

    CAR                 the worker with the least estimated cost: `cost_routing.py`
    SLO_AWARE           the same, among those that would keep the targets
    RR, LEAST_LOAD      `global_scheduler.py`

Whoever chooses, the estimate for the chosen worker is made: it says what to fetch from whom, and
it is compared with what then happened.

One `CostRouting` per group of workers that share the names of blocks; all of them look into one
index, because the names of different models and salts never meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from xllm.cache.block_hash import CacheRoot
from xllm.cache.event_codec import TierCode, short_hashes
from xllm.cache.index import CacheIndex
from xllm.errors import ConfigError, Overloaded
from xllm.protocol import BlockHash, FetchRange, GenerateRequest, WorkerId, WorkerLoad
from xllm.roles.cost_routing import CostRouting, Estimate, Outcome, Prompt, Targets
from xllm.roles.global_scheduler import POLICIES, Candidate, Policy, Route
from xllm.roles.prompt_names import LONG_TOKENS, PromptNames

POLICY_NAMES = ("CAR", *POLICIES, "SLO_AWARE")

DEFAULT_PRIORITY = 0

MAX_RETRY_AFTER_S = 30

Peers = Mapping[WorkerId, str]
"""Workers that serve blocks, and where: `WorkerInfo.block_address`."""

NO_PEERS: Peers = {}


@dataclass(frozen=True, slots=True)
class CostRoute(Route):
    """A route and what it was chosen for."""

    root: CacheRoot
    prompt: Prompt
    estimate: Estimate
    fetch: Sequence[FetchRange]
    """What the worker had better get from peers."""
    names: Sequence[BlockHash]
    """Of the prompt's full blocks."""


class CostAware:
    """`root_of` names what the workers of a model share. `clock` is monotonic, in seconds.

    After `route`: `dispatched` once it was sent, `first_token` and `ended` as they come. Reports
    go to `report`, with the root of the worker's group.
    """

    def __init__(
        self,
        index: CacheIndex,
        root_of: Callable[[str], CacheRoot],
        clock: Callable[[], float],
        policy: Policy | None = None,
        targets: Targets | None = None,
    ) -> None:
        """`policy` chooses instead of the costs; with `targets`, who keeps them does."""
        self._index = index
        self._root_of = root_of
        self._clock = clock
        self._policy = policy
        self._targets = targets
        self._groups: dict[CacheRoot, CostRouting] = {}
        self._names = PromptNames()

    def preparation(self, request: GenerateRequest) -> Callable[[], None] | None:
        """What had better be done on another thread before `route`; None: nothing.

        Raises: UnknownModel, NoWorker.
        """
        is_long = len(request.prompt_ids) >= LONG_TOKENS
        if not is_long or request.sampling.prompt_logprobs is not None:
            return None
        return partial(self._names.prepare, request, self._root_of(request.model_id))

    def report(
        self, root: CacheRoot, worker: WorkerId, load: WorkerLoad, num_unacknowledged: int = 0
    ) -> None:
        """As `CostRouting.report`."""
        self._group(root).report(worker, load, num_unacknowledged)

    def forget(self, worker: WorkerId) -> None:
        """The worker is gone."""
        for group in self._groups.values():
            group.forget(worker)

    def route(
        self, request: GenerateRequest, candidates: Sequence[Candidate], peers: Peers = NO_PEERS
    ) -> CostRoute:
        """One of `candidates`, which are not empty.

        Raises: Overloaded if none would keep the targets.
        """
        root, prompt, names = self._prompt(request)
        group = self._group(root)
        if self._policy is not None:
            chosen = self._policy.route(request, candidates).worker_id
            estimate = group.route(prompt, [Candidate(chosen, None, 0)], peers)
        elif self._targets is not None and self._may_refuse(request):
            in_time = group.route_in_time(prompt, candidates, self._targets, peers)
            if in_time is None:
                raise self._too_late(group.explain(prompt, candidates, peers), self._targets)
            estimate = in_time
        else:
            estimate = group.route(prompt, candidates, peers)
        fetch = estimate.fetch
        ranges: tuple[FetchRange, ...] = ()
        if fetch is not None:
            address = peers[fetch.worker_id]
            ranges = (FetchRange(fetch.worker_id, address, fetch.first, fetch.count),)
        return CostRoute(estimate.worker_id, root, prompt, estimate, ranges, names)

    def explain(
        self, request: GenerateRequest, candidates: Sequence[Candidate], peers: Peers = NO_PEERS
    ) -> list[dict[str, Any]]:
        """What `route` would weigh, the chosen worker first, as JSON; changes nothing.

        With targets, `in_time` says who keeps them; if nobody does, a request would be refused.
        """
        root, prompt, _ = self._prompt(request)
        group = self._group(root)
        estimates = group.explain(prompt, candidates, peers)
        lines = []
        for estimate in estimates:
            tpot_s = group.tpot_s(estimate.worker_id)
            line = describe(estimate) | {"tpot_s": round(tpot_s, 6)}
            if self._targets is not None:
                is_soon = estimate.parts.ttft_s <= self._targets.ttft_s
                line["in_time"] = is_soon and tpot_s <= self._targets.tpot_s
            lines.append(line)
        if self._policy is not None:
            chosen = self._policy.peek(request, candidates).worker_id
            lines.sort(key=lambda line: line["worker_id"] != chosen)
        elif self._targets is not None and self._may_refuse(request):
            lines.sort(key=lambda line: not line["in_time"])
        return lines

    def dispatched(self, route: CostRoute) -> None:
        self._group(route.root).dispatched(route.prompt, route.estimate)

    def first_token(self, route: CostRoute) -> Outcome | None:
        """How good the estimate was; None if that was asked already."""
        return self._group(route.root).first_token(route.prompt.request_id)

    def ended(self, route: CostRoute) -> None:
        self._group(route.root).ended(route.prompt.request_id)

    def _group(self, root: CacheRoot) -> CostRouting:
        group = self._groups.get(root)
        if group is None:
            group = CostRouting(self._index, root.block_size, self._clock)
            self._groups[root] = group
        return group

    def busy_s(self, route: CostRoute, num_output: int) -> float:
        """What the request takes of its worker's time if so many tokens come out."""
        token_s = self._group(route.root).token_s(route.worker_id)
        return route.estimate.parts.computing_s + num_output * token_s

    def _prompt(self, request: GenerateRequest) -> tuple[CacheRoot, Prompt, Sequence[BlockHash]]:
        """A retry brings its output so far, which is computed like a prompt."""
        root = self._root_of(request.model_id)
        names: Sequence[BlockHash] = ()
        # Whoever wants scores of the prompt has all of it computed.
        if request.sampling.prompt_logprobs is None:
            names = self._names.of(request, root)
        attempt = f"{request.request_id}/{request.attempt}/{request.index}"
        num_tokens = len(request.prompt_ids) + len(request.output_ids)
        prompt = Prompt(attempt, short_hashes(names), max(1, num_tokens))
        return root, prompt, names

    @staticmethod
    def _may_refuse(request: GenerateRequest) -> bool:
        """What was accepted goes on, and what is more urgent than usual waits if it must."""
        return request.attempt == 0 and request.priority >= DEFAULT_PRIORITY

    @staticmethod
    def _too_late(estimates: Sequence[Estimate], targets: Targets) -> Overloaded:
        least_s = min(estimate.parts.ttft_s for estimate in estimates)
        if least_s > targets.ttft_s:
            reason = (
                f"the first token would take {least_s:.1f} s on the quickest worker, "
                f"and --target_ttft is {targets.ttft_s:g} s"
            )
        else:
            reason = f"no worker with room keeps --target_tpot at {targets.tpot_s * 1e3:g} ms"
        wait_s = min(math.ceil(max(1.0, least_s - targets.ttft_s)), MAX_RETRY_AFTER_S)
        return Overloaded(
            f"{reason}; try again later, or with a lower priority value", retry_after_s=wait_s
        )


def make_router(
    name: str,
    index: CacheIndex,
    root_of: Callable[[str], CacheRoot],
    clock: Callable[[], float],
    targets: Targets,
) -> CostAware:
    """What `--load_balance_policy=name` asks for. Raises: ConfigError."""
    if name not in POLICY_NAMES:
        raise ConfigError(
            f"--load_balance_policy={name}: expected one of {', '.join(POLICY_NAMES)}"
        )
    policy = POLICIES[name]() if name in POLICIES else None
    return CostAware(index, root_of, clock, policy, targets if name == "SLO_AWARE" else None)


def describe(estimate: Estimate) -> dict[str, Any]:
    """An estimate for people: seconds rounded to microseconds, blocks by tier."""
    parts = estimate.parts
    fetch = estimate.fetch
    return {
        "worker_id": estimate.worker_id,
        "ttft_s": round(parts.ttft_s, 6),
        "cost_s": round(parts.cost_s, 6),
        "backlog_s": round(parts.backlog_s, 6),
        "loading_s": round(parts.loading_s, 6),
        "fetching_s": round(parts.fetching_s, 6),
        "computing_s": round(parts.computing_s, 6),
        "displacing_s": round(parts.displacing_s, 6),
        "prefix_blocks": {
            tier.name.lower(): count for tier, count in zip(TierCode, estimate.prefix, strict=True)
        },
        "fetch": None
        if fetch is None
        else {"worker_id": fetch.worker_id, "first": fetch.first, "count": fetch.count},
    }
