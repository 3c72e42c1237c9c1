"""The workers as one master sees them: watches feed the registry, the registry names the streams.

Whatever arrives changes the registry first; then the tasks that run streams are brought in line
with it. Nothing is awaited in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from xllm.coordination import Change, EtcdClient, Keys, Snapshot, watch_prefix
from xllm.protocol import MasterId, WorkerInfo
from xllm.roles.registry import Registry
from xllm.roles.stream import StreamLimits
from xllm.roles.stream_client import WorkerStream
from xllm.security.trust import ANYBODY, Trust
from xllm.telemetry import Metrics


class Cluster:
    """Knows nobody until `follow` runs."""

    def __init__(
        self,
        master_id: MasterId,
        metrics: Metrics,
        limits: StreamLimits | None = None,
        trust: Trust = ANYBODY,
    ) -> None:
        self._trust = trust
        self.registry: Registry[WorkerStream] = Registry(self._make_stream)
        self._master_id = master_id
        self._metrics = metrics
        self._limits = limits
        self.changed = asyncio.Event()
        """Set whenever a worker came, went or changed; cleared by whoever waits for it."""
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[WorkerStream, asyncio.Task[None]] = {}

    async def follow(self, client: EtcdClient, keys: Keys) -> None:
        """Follows etcd and keeps a stream to each worker, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._watch(client, keys.workers, self.registry.apply_workers))
            tasks.create_task(self._watch(client, keys.load, self.registry.apply_loads))

    def collect(self) -> None:
        for state, count in self.registry.count_states().items():
            self._metrics.workers.labels(state.value).set(count)

    async def _watch(
        self,
        client: EtcdClient,
        prefix: str,
        apply: Callable[[Snapshot | list[Change]], None],
    ) -> None:
        num_snapshots = 0
        async with aclosing(watch_prefix(client, prefix)) as updates:
            async for update in updates:
                if isinstance(update, Snapshot):
                    num_snapshots += 1
                    if num_snapshots > 1:
                        self._metrics.watch_resyncs.inc()
                apply(update)
                self._sync_streams()

    def _make_stream(self, info: WorkerInfo) -> WorkerStream:
        return WorkerStream(
            *(info, self._master_id, self._settle, self._limits),
            on_lost=self._metrics.worker_streams_lost.inc,
            trust=self._trust,
        )

    def _settle(self) -> None:
        """A stream has changed."""
        self.registry.settle()
        self._sync_streams()

    def _sync_streams(self) -> None:
        if self._tasks is None:
            return
        self.changed.set()
        wanted = self.registry.streams()
        for stream in self._running.keys() - wanted:
            self._running.pop(stream).cancel()
        for stream in wanted - self._running.keys():
            self._running[stream] = self._tasks.create_task(stream.run())
