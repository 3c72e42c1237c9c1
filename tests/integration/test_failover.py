"""Requests on workers that die, freeze, drain and refuse: real streams, engines that only count."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest
from counting_engine import CountingEngine, make_info, make_request, until

from xllm.cache.index import CacheIndex
from xllm.config import RoutingConfig
from xllm.coordination import PUT, Change, KeyValue
from xllm.errors import NoWorker, Overloaded, WorkerLost
from xllm.protocol import Epoch, MasterId, TokenizerFiles, WorkerId, WorkerInfo
from xllm.roles import cluster_backend
from xllm.roles.car_policy import make_router
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.cost_routing import Targets
from xllm.roles.registry import Registry
from xllm.roles.routed_generation import RoutedGeneration
from xllm.roles.stream import StreamLimits
from xllm.roles.stream_client import WorkerStream
from xllm.roles.stream_server import StreamServer
from xllm.telemetry import Metrics

LIMITS = StreamLimits(
    min_backoff_s=0.01, max_backoff_s=0.05, ping_s=0.02, suspect_s=0.1, lost_s=0.3
)


class Worker:
    def __init__(self, name: str) -> None:
        self.engine = CountingEngine()
        self.server = StreamServer(
            WorkerId(name), Epoch(7), self.engine, TokenizerFiles({}), LIMITS
        )
        self.listening = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{self.listening.getsockname()[1]}"
        self.info = make_info(name, address=address)

    def die(self) -> None:
        """As a process that is killed: its connections close without a word."""
        for connection in list(self.server.connections):
            connection.abort("killed")
        self.server.close()

    def freeze(self) -> None:
        """It goes on, but nobody hears of it."""
        for connection in self.server.connections:
            connection.send = lambda message: None  # type: ignore[method-assign]


class Fleet:
    """Workers, and the master that uses them in turn."""

    def __init__(self, routing: RoutingConfig) -> None:
        self.workers: dict[str, Worker] = {}
        self.metrics = Metrics()
        self.registry: Registry[WorkerStream] = Registry(self._make_stream)
        router = make_router(
            "RR", CacheIndex(), self.registry.cache_root, time.monotonic, Targets(1.0, 0.1)
        )
        self.backend = ClusterBackend(self.registry, router, self.metrics, limits=routing)
        self._tasks: list[asyncio.Task[None]] = []

    def _make_stream(self, info: WorkerInfo) -> WorkerStream:
        stream = WorkerStream(info, MasterId("m"), self._settle, LIMITS)
        self._tasks.append(asyncio.create_task(stream.run()))
        return stream

    def _settle(self) -> None:
        self.registry.settle()

    async def add(self, name: str) -> Worker:
        worker = self.workers[name] = Worker(name)
        await worker.server.start(worker.listening)
        key = f"/xllm/t/workers/{name}"
        kv = KeyValue(key, msgspec.json.encode(worker.info), 1, 1, worker.info.epoch)
        self.registry.apply_workers([Change(PUT, kv)])
        await until(lambda: self.state(name) == "ready")
        return worker

    def state(self, name: str) -> str:
        return next(m.state.value for m in self.registry if m.info.worker_id == name)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers.values():
            worker.die()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet(RoutingConfig())
    yield fleet
    await fleet.stop()


class Reader:
    """Reads a generation as its client would."""

    def __init__(self, generation: RoutedGeneration) -> None:
        self.generation = generation
        self.tokens: dict[int, list[int]] = {}
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> dict[int, list[int]]:
        async for delta in self.generation:
            self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
        return self.tokens


async def test_killed_workers_hand_over_what_they_run(fleet: Fleet) -> None:
    a, b = await fleet.add("a"), await fleet.add("b")
    readers = [Reader(fleet.backend.generate(make_request(f"r{i}", 6))) for i in range(10)]
    await until(lambda: len(a.engine.running) == len(b.engine.running) == 5)
    for _ in range(2):
        a.engine.step()
    await until(lambda: len(readers[0].tokens.get(0, ())) == 2)
    a.die()
    await until(lambda: len(b.engine.running) == 10)
    moved = [running.request for running in b.engine.running[5:]]
    assert [(request.attempt, request.output_ids) for request in moved] == [(1, [0, 1])] * 5
    for _ in range(6):
        b.engine.step()
    for reader in readers:
        assert await reader.task == {0: [0, 1, 2, 3, 4, 5]}
    assert b"xllm_requests_resubmitted_total 5.0" in fleet.metrics.render()


async def test_samples_move_one_by_one(fleet: Fleet) -> None:
    a = await fleet.add("a")
    reader = Reader(fleet.backend.generate(make_request("r", 4, n=3)))
    await until(lambda: bool(a.engine.running))
    a.engine.step()
    await until(lambda: len(reader.tokens) == 3)
    b = await fleet.add("b")
    a.die()
    await until(lambda: len(b.engine.running) == 3)
    for _ in range(3):
        b.engine.step()
    assert await reader.task == {index: [0, 1, 2, 3] for index in range(3)}


async def test_a_frozen_worker_is_suspect_then_lost_and_its_late_frames_are_dropped(
    fleet: Fleet,
) -> None:
    a, b = await fleet.add("a"), await fleet.add("b")
    reader = Reader(fleet.backend.generate(make_request("r", 3)))
    await until(lambda: bool(a.engine.running))
    a.engine.step()
    await until(lambda: bool(reader.tokens))
    a.freeze()
    await until(lambda: fleet.state("a") == "suspect")
    assert fleet.backend.generate(make_request("new")).worker_id == "b"
    assert reader.generation.worker_id == "a", "until it is lost"
    await until(lambda: "r" in b.engine.running_ids)
    assert reader.generation.worker_id == "b"
    assert reader.tokens == {0: [0]}
    for _ in range(2):
        b.engine.step()
    assert await reader.task == {0: [0, 1, 2]}
    await until(lambda: a.engine.cancelled == ["r"])


async def test_a_worker_whose_engine_is_stuck_gets_no_new_requests(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_failover.LIMITS", replace(LIMITS, stuck_s=0.1))
    await fleet.add("a")
    b = await fleet.add("b")
    stuck = Reader(fleet.backend.generate(make_request("r")))
    await until(lambda: fleet.state("a") == "suspect")
    assert not stuck.task.done(), "one step may take long"
    assert fleet.state("b") == "ready"
    assert fleet.backend.generate(make_request("new")).worker_id == "b"
    await until(lambda: b.engine.running_ids == ["new"])
    fleet.workers["a"].engine.step()
    await until(lambda: fleet.state("a") == "ready")
    stuck.generation.cancel()


async def test_what_a_drain_does_not_finish_moves(fleet: Fleet) -> None:
    a, b = await fleet.add("a"), await fleet.add("b")
    short = Reader(fleet.backend.generate(make_request("short", 2)))
    b_one = Reader(fleet.backend.generate(make_request("b", 1)))
    long = Reader(fleet.backend.generate(make_request("long", 9)))
    await until(lambda: len(a.engine.running) == 2)
    draining = asyncio.create_task(a.server.drain(0.2))
    a.engine.step()
    a.engine.step()
    assert await short.task == {0: [0, 1]}
    await until(lambda: fleet.state("a") == "draining")
    await draining
    a.server.close()
    await until(lambda: len(b.engine.running) == 2)
    for _ in range(8):
        b.engine.step()
    assert await long.task == {0: list(range(9))}
    assert await b_one.task == {0: [0]}


async def test_leaving_workers_are_no_losses(fleet: Fleet) -> None:
    """A rolling restart may move a long request more often than workers may die under it."""
    workers = [await fleet.add(name) for name in "abcdef"]
    reader = Reader(fleet.backend.generate(make_request("r", 6)))
    for worker in workers[:-1]:
        await until(lambda worker=worker: bool(worker.engine.running))
        worker.engine.step()
        await worker.server.drain(0)
        worker.server.close()
    await until(lambda: bool(workers[-1].engine.running))
    workers[-1].engine.step()
    assert await reader.task == {0: list(range(6))}


async def test_a_request_that_kills_its_workers_is_given_up(fleet: Fleet) -> None:
    workers = [await fleet.add(name) for name in "abcd"]
    reader = Reader(fleet.backend.generate(make_request("r")))
    for worker in workers[:3]:
        await until(lambda worker=worker: bool(worker.engine.running))
        worker.die()
    with pytest.raises(WorkerLost, match="3 workers"):
        await reader.task
    assert not workers[3].engine.running


async def test_a_blip_of_the_only_worker_is_waited_out(fleet: Fleet) -> None:
    a = await fleet.add("a")
    reader = Reader(fleet.backend.generate(make_request("r", 2)))
    await until(lambda: bool(a.engine.running))
    a.engine.step()
    await until(lambda: bool(reader.tokens))
    for connection in list(a.server.connections):
        connection.abort("cut")
    await until(lambda: bool(a.engine.running))
    assert a.engine.running[0].request.output_ids == [0]
    a.engine.step()
    assert await reader.task == {0: [0, 1]}


async def test_requests_that_come_during_a_blip_wait_for_its_end(fleet: Fleet) -> None:
    a = await fleet.add("a")
    await fleet.backend.until_reachable("m")
    for connection in list(a.server.connections):
        connection.abort("cut")
    await until(lambda: fleet.state("a") == "connecting")
    assert fleet.backend.model_cards() == []
    early = Reader(fleet.backend.generate(make_request("early", 1)))
    async with asyncio.timeout(5):
        await fleet.backend.until_reachable(None)
    assert len(fleet.backend.model_cards()) == 1
    await until(lambda: a.engine.running_ids == ["early"])
    a.engine.step()
    assert await early.task == {0: [0]}


async def test_a_worker_that_stays_away_is_waited_for_only_a_moment(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_backend, "RECONNECT_S", 0.1)
    a = await fleet.add("a")
    a.die()
    await until(lambda: fleet.state("a") == "connecting")
    async with asyncio.timeout(5):
        await fleet.backend.until_reachable("m")
    with pytest.raises(NoWorker):
        fleet.backend.generate(make_request("r"))


async def test_too_long_a_queue_is_refused_and_says_when_to_come_back() -> None:
    fleet = Fleet(RoutingConfig(max_queue_time=0.5))
    a = await fleet.add("a")
    for i in range(64):
        fleet.backend.generate(make_request(f"r{i}", 1))
    await until(lambda: len(a.engine.running) == 64)
    await asyncio.sleep(1.1)
    with pytest.raises(Overloaded, match="max_queue_time") as caught:
        fleet.backend.generate(make_request("late"))
    assert caught.value.retry_after_s is not None
    a.engine.step()
    await until(lambda: fleet.registry.stream(WorkerId("a")).queue.num_queued == 0)
    assert fleet.backend.generate(make_request("welcome")).worker_id == "a"
    await fleet.stop()
