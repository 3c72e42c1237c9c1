"""CAR as a `Policy`: requests in, routes out. Pure.

One `CostRouting` per group of workers that share the names of blocks; all of them look into one
index, because the names of different models and salts never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.cache.event_codec import TierCode, short_hashes
from xllm.cache.index import CacheIndex
from xllm.protocol import GenerateRequest, WorkerId, WorkerLoad
from xllm.roles.cost_routing import CostRouting, Estimate, Outcome, Prompt
from xllm.roles.global_scheduler import Candidate, Route


@dataclass(frozen=True, slots=True)
class CostRoute(Route):
    """A route and what it was chosen for; `estimate.fetch` is what to get from a peer."""

    root: CacheRoot
    prompt: Prompt
    estimate: Estimate


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
    ) -> None:
        self._index = index
        self._root_of = root_of
        self._clock = clock
        self._groups: dict[CacheRoot, CostRouting] = {}

    def report(
        self, root: CacheRoot, worker: WorkerId, load: WorkerLoad, num_unacknowledged: int = 0
    ) -> None:
        """As `CostRouting.report`."""
        self._group(root).report(worker, load, num_unacknowledged)

    def forget(self, worker: WorkerId) -> None:
        """The worker is gone."""
        for group in self._groups.values():
            group.forget(worker)

    def route(self, request: GenerateRequest, candidates: Sequence[Candidate]) -> CostRoute:
        root, prompt = self._prompt(request)
        estimate = self._group(root).route(prompt, candidates)
        return CostRoute(estimate.worker_id, root, prompt, estimate)

    def explain(
        self, request: GenerateRequest, candidates: Sequence[Candidate]
    ) -> list[dict[str, Any]]:
        """What `route` would weigh, the chosen worker first, as JSON; changes nothing."""
        root, prompt = self._prompt(request)
        return [describe(estimate) for estimate in self._group(root).explain(prompt, candidates)]

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

    def _prompt(self, request: GenerateRequest) -> tuple[CacheRoot, Prompt]:
        """A retry brings its output so far, which is computed like a prompt."""
        root = self._root_of(request.model_id)
        token_ids = request.prompt_ids + request.output_ids
        hashes = hash_blocks(root.hash(request.salt), token_ids, root.block_size)
        name = f"{request.request_id}/{request.attempt}/{request.index}"
        return root, Prompt(name, short_hashes(hashes), max(1, len(token_ids)))


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
