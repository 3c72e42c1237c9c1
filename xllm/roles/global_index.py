"""A master's copy of the whole cluster's index: kept up with etcd, measured, and loud when somebody
is missing from it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from xllm.cache.index import CacheIndex
from xllm.coordination import EtcdClient, Keys
from xllm.protocol import WorkerId
from xllm.roles.index_reader import IndexReader
from xllm.roles.index_view import IndexView, IndexViewStatistics
from xllm.telemetry import Metrics

logger = logging.getLogger(__name__)

WARNING_PERIOD_S = 60.0


class GlobalIndex:
    """`index` is empty until `run` has read it. `answers` tells whether a worker whose key is gone
    is still there."""

    def __init__(self, keys: Keys, answers: Callable[[WorkerId], bool], metrics: Metrics) -> None:
        self.index = CacheIndex()
        self.view = IndexView(keys, self.index, answers)
        self._keys = keys
        self._metrics = metrics
        self._reader: IndexReader | None = None
        self._counted: IndexViewStatistics = self.view.statistics()

    async def run(self, client: EtcdClient) -> None:
        """Until it is cancelled."""
        self._reader = IndexReader(client, self._keys, self.view)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reader.run())
            tasks.create_task(self._name_the_silent())

    def forget(self, worker_id: WorkerId) -> None:
        """The worker does not answer any more."""
        self.view.forget(worker_id)
        if self._reader is not None:
            self._reader.wake()

    def collect(self) -> None:
        """Brings the metrics up to date."""
        metrics = self._metrics
        now, before = self.view.statistics(), self._counted
        self._counted = now
        held = self.index.statistics()
        metrics.index_blocks.set(held.num_blocks)
        metrics.index_copies.set(held.num_copies)
        metrics.index_workers_without_events.set(len(self.view.workers_without_events()))
        metrics.index_batches.inc(now.num_batches - before.num_batches)
        metrics.index_bytes.inc(now.num_bytes - before.num_bytes)
        metrics.index_gaps.inc(now.num_gaps - before.num_gaps)
        metrics.index_late_batches.inc(now.num_late - before.num_late)
        metrics.index_bad_values.inc(now.num_bad - before.num_bad)

    async def _name_the_silent(self) -> None:
        """Silent least-load routing to a worker looks like a cold cache, so it is said aloud."""
        while True:
            await asyncio.sleep(WARNING_PERIOD_S)
            for worker_id in self.view.workers_without_events():
                logger.warning(
                    "no_cache_events worker_id=%s reason=%r",
                    worker_id,
                    "it publishes no blocks, so its cache is not counted: --enable_cache_upload",
                )
