"""A master's view of its workers: real etcd, real streams, engines that only count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
from counting_engine import make_request, until
from etcd_server import EtcdServer
from routed_cluster import Master, Worker

from xllm.coordination import EtcdClient, Fenced
from xllm.errors import ConfigError, NoWorker, UnknownModel, WorkerLost
from xllm.roles import cluster_backend, membership, routed_generation
from xllm.roles.routed_generation import RoutedGeneration

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
