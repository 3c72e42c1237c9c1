"""Workers without models and masters without HTTP: all that lies between, over a real etcd."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Coroutine, Sequence

from counting_engine import CountingEngine, make_info, until

from xllm.cache.block_hash import hash_blocks
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import TierCode
from xllm.cache.upload import IndexUploader
from xllm.cache.upload_budget import Share
from xllm.cache.upload_plan import UploadPlan
from xllm.coordination import EtcdClient, Keys, Session
from xllm.protocol import Epoch, MasterId, TokenizerFiles, WorkerId, WorkerInfo, WorkerLoad
from xllm.roles.car_policy import make_router
from xllm.roles.cluster import Cluster
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.cost_routing import Targets
from xllm.roles.global_index import GlobalIndex
from xllm.roles.hot_prefix_duty import HotPrefixDuty
from xllm.roles.membership import WorkerMembership
from xllm.roles.registration import cache_root
from xllm.roles.registry import MemberState
from xllm.roles.stream import StreamLimits
from xllm.roles.stream_server import StreamServer
from xllm.telemetry import Metrics

KEYS = Keys("test")
TTL_S = 1.0
LIMITS = StreamLimits(min_backoff_s=0.01, max_backoff_s=0.05, ping_s=0.05)


class Worker:
    """All of a worker but its model."""

    def __init__(self, client: EtcdClient, name: str, **info: object) -> None:
        self.name = name
        self.engine = CountingEngine()
        self.session = Session(client, TTL_S)
        self.server = StreamServer(
            WorkerId(name), self.session.epoch, self.engine, TokenizerFiles({}), LIMITS
        )
        self.session.on_new_epoch(self.server.change_epoch)
        self.membership = WorkerMembership(self.session, KEYS, self._info, self._load, Metrics())
        self.load: dict[str, object] = {}
        """Fields of its reports."""
        self._changes = info
        self.uploader: IndexUploader | None = None
        self._address = ""
        self._tasks: list[asyncio.Task[None]] = []

    def _info(self, epoch: Epoch) -> WorkerInfo:
        return make_info(self.name, epoch=epoch, address=self._address, **self._changes)

    def _load(self, epoch: Epoch) -> WorkerLoad:
        return WorkerLoad(
            epoch=epoch,
            running_requests_num=len(self.engine.running),
            watermarks=self.server.watermarks(),
            **self.load,
        )

    async def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self._address = f"127.0.0.1:{listening.getsockname()[1]}"
        await self.server.start(listening)
        self._run(self.session.run())
        await self.membership.join()
        self._run(self.membership.publish_load())

    def publish(self) -> None:
        """Begins to upload what it holds: nothing yet."""
        plan = UploadPlan(Share(puts_per_s=500, bytes_per_s=5e6), random.Random(1))
        self.uploader = IndexUploader(self.session, KEYS, WorkerId(self.name), plan)
        self._run(self.uploader.run())

    def hold(self, token_ids: Sequence[int], salt: str = "") -> None:
        """As if it had computed a prompt."""
        assert self.uploader is not None
        root = cache_root(self._info(self.session.epoch))
        names = hash_blocks(root.hash(salt), token_ids, root.block_size)
        events = [BlockEvent(BlockEventKind.STORED, name) for name in names]
        self.uploader.record(TierCode.DEVICE, events)

    def _run(self, coroutine: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.create_task(coroutine))

    async def end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        await self.server.drain(0)
        await self.session.close()
        self.server.close()
        await self.end_tasks()

    async def die(self) -> None:
        """Without a goodbye: the lease stays until it expires."""
        for connection in list(self.server.connections):
            connection.abort("killed")
        self.server.close()
        await self.end_tasks()


class Master:
    def __init__(self, client: EtcdClient, policy: str = "RR") -> None:
        self.metrics = Metrics()
        self.cluster = Cluster(MasterId("master"), self.metrics, LIMITS)
        registry = self.cluster.registry
        self.index = GlobalIndex(KEYS, registry.answers, self.metrics)
        registry.on_gone(self.index.forget)
        router = make_router(
            policy, self.index.index, registry.cache_root, time.monotonic, Targets(1.0, 0.1)
        )
        self.hot = HotPrefixDuty(self.index.index, router, registry, self.metrics, time.monotonic)
        self.backend = ClusterBackend(registry, router, self.metrics, on_sent=self.hot.observe)
        self.task = asyncio.create_task(self._run(client))

    async def _run(self, client: EtcdClient) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.cluster.follow(client, KEYS))
            tasks.create_task(self.index.run(client))

    def states(self) -> dict[str, MemberState]:
        return {member.info.worker_id: member.state for member in self.cluster.registry}

    async def sees(self, **states: str) -> None:
        await until(lambda: self.states() == states, timeout_s=10)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
