"""Keeps a master's `IndexView` up with etcd, in slices between the requests that it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing

from xllm.coordination import EtcdClient, EtcdRefused, Keys, watch_prefix
from xllm.errors import EtcdUnavailable
from xllm.roles.index_view import IndexView, WorkerSnapshot

logger = logging.getLogger(__name__)

SLICE_S = 0.002
"""How long the loop is held up at a time; a slice of the index may add half a millisecond."""

MAX_QUEUED = 256
"""Updates that wait to be applied; then the watch waits, and etcd keeps the rest."""

RESYNC_DELAY_S = 1.0
"""Between two attempts to read again what is missing."""


class IndexReader:
    """Feeds `view` from one watch over the namespace, so that a registration and the blocks that
    belong to it come in the order in which they were written."""

    def __init__(self, client: EtcdClient, keys: Keys, view: IndexView) -> None:
        self._client = client
        self._keys = keys
        self._view = view
        self._fed = asyncio.Event()
        self._drained = asyncio.Event()
        self._gap = asyncio.Event()

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            tasks.create_task(self._work())
            tasks.create_task(self._resync())

    def wake(self) -> None:
        """The view was fed by somebody else."""
        self._fed.set()

    async def _watch(self) -> None:
        async with aclosing(watch_prefix(self._client, self._keys.root)) as updates:
            async for update in updates:
                self._view.feed(update)
                self._fed.set()
                while self._view.num_queued >= MAX_QUEUED:
                    self._drained.clear()
                    await self._drained.wait()

    async def _work(self) -> None:
        while True:
            self._fed.clear()
            self._view.work(_timer(SLICE_S))
            if self._view.num_queued < MAX_QUEUED:
                self._drained.set()
            if self._view.missing():
                self._gap.set()
            if self._view.is_idle:
                await self._fed.wait()
            else:
                await asyncio.sleep(0)

    async def _resync(self) -> None:
        while True:
            await self._gap.wait()
            self._gap.clear()
            for worker_id, epoch in self._view.missing():
                try:
                    snapshot = await self._client.range(self._keys.cache_of(worker_id, epoch))
                except (EtcdUnavailable, EtcdRefused) as error:
                    logger.info("index_resync_waits worker_id=%s error=%s", worker_id, error)
                    self._gap.set()
                    continue
                self._view.feed(WorkerSnapshot(worker_id, epoch, snapshot.kvs))
                self._fed.set()
            await asyncio.sleep(RESYNC_DELAY_S)


def _timer(seconds: float) -> Callable[[], bool]:
    """Whether so long has passed since."""
    ends_at = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends_at
