"""A master's view of its workers: real etcd, real streams, engines that only count."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
from counting_engine import CountingEngine, make_info, make_request, until
from etcd_server import EtcdServer

from xllm.coordination import EtcdClient, Fenced, Keys, Session
from xllm.errors import ConfigError, NoWorker, UnknownModel, WorkerLost
from xllm.protocol import Epoch, MasterId, TokenizerFiles, WorkerId, WorkerInfo, WorkerLoad
from xllm.roles import cluster_backend, membership, routed_generation
from xllm.roles.car_policy import make_router
from xllm.roles.cluster import Cluster
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.cost_routing import Targets
from xllm.roles.global_index import GlobalIndex
from xllm.roles.membership import WorkerMembership
from xllm.roles.registry import MemberState
from xllm.roles.routed_generation import RoutedGeneration
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
        self._changes = info
        self._address = ""
        self._tasks: list[asyncio.Task[None]] = []

    def _info(self, epoch: Epoch) -> WorkerInfo:
        return make_info(self.name, epoch=epoch, address=self._address, **self._changes)

    def _load(self, epoch: Epoch) -> WorkerLoad:
        return WorkerLoad(
            epoch=epoch,
            running_requests_num=len(self.engine.running),
            watermarks=self.server.watermarks(),
        )

    async def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self._address = f"127.0.0.1:{listening.getsockname()[1]}"
        await self.server.start(listening)
        self._run(self.session.run())
        await self.membership.join()
        self._run(self.membership.publish_load())

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
        self.backend = ClusterBackend(registry, router, self.metrics)
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


StartWorker = Callable[..., Coroutine[None, None, Worker]]


@pytest.fixture
async def start_worker(client: EtcdClient) -> AsyncIterator[StartWorker]:
    workers: list[Worker] = []

    async def start(name: str, **info: object) -> Worker:
        worker = Worker(client, name, **info)
        workers.append(worker)
        await worker.start()
        return worker

    yield start
    for worker in workers:
        await worker.stop()


@pytest.fixture
async def master(client: EtcdClient) -> AsyncIterator[Master]:
    master = Master(client)
    yield master
    await master.stop()


async def tokens_of(generation: RoutedGeneration) -> list[int]:
    return [token for delta in [d async for d in generation] for token in delta.token_ids]


async def answer(master: Master, *workers: Worker, name: str = "r") -> list[int]:
    generation = master.backend.generate(make_request(name, 2))
    await until(lambda: any(name in worker.engine.running_ids for worker in workers))
    for worker in workers:
        worker.engine.step()
        worker.engine.step()
    return await tokens_of(generation)


async def test_workers_join_serve_and_leave(master: Master, start_worker: StartWorker) -> None:
    with pytest.raises(NoWorker):
        master.backend.generate(make_request("early"))
    a, b = await start_worker("a"), await start_worker("b")
    await master.sees(a="ready", b="ready")
    assert [card.model_id for card in master.backend.model_cards()] == ["m"]
    with pytest.raises(UnknownModel):
        master.backend.generate(make_request("r", model_id="other"))
    assert [await answer(master, a, b, name=f"r{i}") for i in range(4)] == [[0, 1]] * 4
    assert (a.engine.step_counter, len(a.engine.cancelled)) == (8, 0)
    await a.stop()
    await master.sees(b="ready")
    assert await answer(master, b) == [0, 1]
    c = await start_worker("c")
    await master.sees(b="ready", c="ready")
    assert await answer(master, b, c) == [0, 1]


async def test_both_workers_get_requests(master: Master, start_worker: StartWorker) -> None:
    a, b = await start_worker("a"), await start_worker("b")
    await master.sees(a="ready", b="ready")
    generations = [master.backend.generate(make_request(f"r{i}")) for i in range(6)]
    await until(lambda: len(a.engine.running) == len(b.engine.running) == 3)
    assert [g.worker_id for g in generations] == ["a", "b"] * 3
    for generation in generations:
        generation.cancel()
    await until(lambda: not a.engine.running and not b.engine.running)


async def test_a_worker_that_stops_finishes_what_runs(
    master: Master, start_worker: StartWorker
) -> None:
    a = await start_worker("a")
    await master.sees(a="ready")
    generation = master.backend.generate(make_request("r", 1))
    await until(lambda: bool(a.engine.running))
    draining = asyncio.create_task(a.server.drain(10))
    await master.sees(a="draining")
    with pytest.raises(NoWorker):
        master.backend.generate(make_request("late"))
    a.engine.step()
    assert await tokens_of(generation) == [0]
    await draining


async def test_the_only_worker_dies_and_is_forgotten_with_its_lease(
    master: Master, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routed_generation, "PLACE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(cluster_backend, "RECONNECT_S", 0.0)
    a = await start_worker("a")
    await master.sees(a="ready")
    generation = master.backend.generate(make_request("r"))
    await until(lambda: bool(a.engine.running))
    await a.die()
    with pytest.raises(WorkerLost, match="no other"):
        await tokens_of(generation)
    await master.sees(a="connecting")
    with pytest.raises(NoWorker):
        master.backend.generate(make_request("late"))
    await master.sees()


async def test_the_same_worker_comes_back_under_a_new_epoch(
    master: Master, start_worker: StartWorker
) -> None:
    a = await start_worker("a")
    await master.sees(a="ready")
    await a.die()
    again = await start_worker("a")
    assert again.session.epoch != a.session.epoch
    await master.sees(a="ready")
    assert await answer(master, again) == [0, 1]


async def test_a_lost_lease_fails_no_request(
    master: Master, client: EtcdClient, start_worker: StartWorker
) -> None:
    a = await start_worker("a")
    await master.sees(a="ready")
    generation = master.backend.generate(make_request("r", 2))
    await until(lambda: bool(a.engine.running))
    a.engine.step()
    lost = a.session.epoch
    await client.revoke(lost, timeout_s=5)
    await master.sees(a="suspect")
    await master.sees(a="ready")
    assert a.session.epoch != lost
    assert a.server.epoch == a.session.epoch
    a.engine.step()
    assert await tokens_of(generation) == [0, 1]
    assert await answer(master, a, name="after") == [0, 1]


async def test_an_etcd_that_comes_back_empty_fails_no_request(
    master: Master, etcd: EtcdServer, start_worker: StartWorker
) -> None:
    a = await start_worker("a")
    await master.sees(a="ready")
    generation = master.backend.generate(make_request("r", 2))
    await until(lambda: bool(a.engine.running))
    etcd.kill()
    assert await answer(master, a, name="during") == [0, 1]
    etcd.wipe()
    await asyncio.to_thread(etcd.start)
    lost = a.session.epoch
    await until(lambda: a.session.epoch != lost and a.session.alive, timeout_s=15)
    await master.sees(a="ready")
    assert await answer(master, a, name="after") == [0, 1]
    generation.cancel()
    await until(lambda: not a.engine.running)


async def test_a_second_worker_of_one_id_is_fenced(start_worker: StartWorker) -> None:
    await start_worker("a")
    with pytest.raises(Fenced):
        await start_worker("a")


@pytest.mark.parametrize(
    ("change", "reason"), [({"fingerprint": "0"}, "weights"), ({"block_size": 16}, "block_size")]
)
async def test_a_worker_that_does_not_fit_its_model_does_not_register(
    master: Master, start_worker: StartWorker, change: dict[str, object], reason: str
) -> None:
    await start_worker("a")
    with pytest.raises(ConfigError, match=reason):
        await start_worker("b", **change)
    await master.sees(a="ready")


async def test_masters_refuse_a_worker_that_registers_all_the_same(
    master: Master, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "find_conflict", lambda info, registered: "")
    a = await start_worker("a")
    await start_worker("b", block_size=16)
    await master.sees(a="ready", b="refused")
    assert master.backend.generate(make_request("r")).worker_id == "a"
    await a.stop()
    await master.sees(b="ready")


async def test_load_is_reported_and_completed(
    master: Master, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "LOAD_PERIOD_S", 0.05)
    a = await start_worker("a")
    await master.sees(a="ready")
    registry = master.cluster.registry

    def is_reported(num_running: int) -> bool:
        load = registry.candidates("m")[0].load
        return load is not None and load.running_requests_num == num_running

    for i in range(3):
        master.backend.generate(make_request(f"r{i}", 1))
    assert registry.candidates("m")[0].num_requests == 3
    await until(lambda: is_reported(3))
    assert registry.candidates("m")[0].unreported == 0
    a.engine.step()
    await until(lambda: is_reported(0))
    assert registry.candidates("m")[0].num_requests == 0


async def test_metrics_count_workers_by_state(master: Master, start_worker: StartWorker) -> None:
    await start_worker("a")
    await master.sees(a="ready")
    master.cluster.collect()
    assert b'xllm_workers{state="ready"} 1.0' in master.metrics.render()
    assert b'xllm_workers{state="suspect"} 0.0' in master.metrics.render()
