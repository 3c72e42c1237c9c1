"""Has hot prefixes fetched ahead of requests: counts in every master, acts in the leader.

A master sees its own requests only, so with several of them the leader's counts are a part of the
truth: what it finds hot is hot, and what it misses is spread by routing, a little later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from xllm.cache.index import CacheIndex
from xllm.coordination import EtcdRefused
from xllm.errors import EtcdUnavailable, RequestError
from xllm.protocol import CommandKind, FetchRange, GenerateRequest
from xllm.roles.car_policy import CostAware, CostRoute
from xllm.roles.command_desk import CommandDesk
from xllm.roles.commands import join_names
from xllm.roles.hot_prefixes import Assignment, HotPrefixes
from xllm.roles.registry import Registry
from xllm.roles.stream_client import WorkerStream
from xllm.telemetry import Metrics

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
DEADLINE_S = 10.0
MAX_OUTPUT_TOKENS = 128
"""Counted of an answer, whatever its request allows."""


class HotPrefixDuty:
    """`observe` each request that was sent; `run` once etcd is there."""

    def __init__(
        self,
        index: CacheIndex,
        router: CostAware,
        registry: Registry[WorkerStream],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._index = index
        self._router = router
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self._hot: dict[str, HotPrefixes] = {}
        """By model."""

    def observe(self, request: GenerateRequest, route: CostRoute) -> None:
        hot = self._hot.get(request.model_id)
        if hot is None:
            hot = self._hot[request.model_id] = HotPrefixes(self._index, self._clock)
        num_output = min(request.n * request.sampling.max_tokens, MAX_OUTPUT_TOKENS)
        hot.observe(route.names, self._router.busy_s(route, num_output))

    async def run(self, desk: CommandDesk, is_leader: Callable[[], bool]) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(PERIOD_S)
                if is_leader():
                    for model_id in self._hot:
                        for assignment in self._assignments(model_id):
                            tasks.create_task(self._fetch(desk, model_id, assignment))

    def _assignments(self, model_id: str) -> list[Assignment]:
        """For workers that take requests and serve blocks; how busy they are is how many requests
        they have."""
        try:
            candidates = self._registry.candidates(model_id)
        except RequestError:
            return []
        num_requests = {c.worker_id: float(c.num_requests) for c in candidates}
        able = [w for w in self._registry.block_addresses(model_id) if w in num_requests]
        leaving = self._registry.leaving_block_addresses(model_id)
        hot, business = self._hot[model_id], num_requests.__getitem__
        return hot.assign(business, able) + hot.rescue(business, able, leaving)

    async def _fetch(self, desk: CommandDesk, model_id: str, assignment: Assignment) -> None:
        info = self._registry.info(assignment.worker)
        addresses = {
            **self._registry.leaving_block_addresses(model_id),
            **self._registry.block_addresses(model_id),
        }
        sources = [holder for holder in assignment.holders if holder in addresses]
        if info is None or not sources:
            return
        source, count = sources[0], len(assignment.names)
        fetch = [FetchRange(source, addresses[source], 0, count)]
        fields: dict[str, Any] = {"blocks": join_names(assignment.names), "fetch": fetch}
        logger.info(
            "hot_prefix worker_id=%s source=%s num_blocks=%d hash=%s",
            *(assignment.worker, source, count, assignment.names[-1].hex()[:8]),
        )
        self._metrics.hot_prefixes_assigned.inc()
        try:
            await desk.ask([info], CommandKind.MOVE, DEADLINE_S, fields)
        except (EtcdUnavailable, EtcdRefused) as error:
            logger.info("hot_prefix_not_fetched worker_id=%s error=%r", info.worker_id, str(error))
