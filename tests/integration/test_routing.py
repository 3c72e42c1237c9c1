"""Requests that follow their blocks: a real etcd, real streams, workers that only say they hold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
from counting_engine import make_request, until
from routed_cluster import KEYS, Master, Worker

from xllm.cache.block_hash import hash_blocks
from xllm.coordination import EtcdClient
from xllm.errors import Overloaded
from xllm.protocol import (
    Command,
    CommandKind,
    FetchRange,
    GenerateRequest,
    MasterId,
    PrefillCost,
    WorkerId,
)
from xllm.roles import global_index, hot_prefix_duty, membership
from xllm.roles.command_desk import CommandDesk
from xllm.roles.commands import decode_command, split_names

BLOCK = 32
COST = PrefillCost(0.01, 1e-3, 0.0)
PROMPT = list(range(10 * BLOCK))
PEER_BLOCK_S = 0.001

StartWorker = Callable[..., Coroutine[None, None, Worker]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "LOAD_PERIOD_S", 0.05)
    monkeypatch.setattr(global_index, "WARNING_PERIOD_S", 0.1)
    monkeypatch.setattr(hot_prefix_duty, "PERIOD_S", 0.05)


@pytest.fixture
async def start_worker(client: EtcdClient) -> AsyncIterator[StartWorker]:
    workers: list[Worker] = []

    async def start(name: str, *, publishes: bool = True, **info: object) -> Worker:
        worker = Worker(client, name, **info)
        worker.load = {"prefill_cost": COST}
        workers.append(worker)
        await worker.start()
        if publishes:
            worker.publish()
        return worker

    yield start
    for worker in workers:
        await worker.stop()


@pytest.fixture
async def master(client: EtcdClient) -> AsyncIterator[Master]:
    master = Master(client, "CAR")
    yield master
    await master.stop()


def request(name: str, prompt: list[int] = PROMPT, **fields: object) -> GenerateRequest:
    return make_request(name, 2, prompt_ids=prompt, **fields)


def num_held(master: Master, worker: Worker) -> int:
    return sum(master.index.index.num_held(WorkerId(worker.name)))


async def finish(master: Master, asked: GenerateRequest, *workers: Worker) -> str:
    """Runs a request to its end; who ran it."""
    generation = master.backend.generate(asked)
    running = [w for w in workers if w.name == generation.worker_id]
    await until(lambda: asked.request_id in running[0].engine.running_ids)
    running[0].engine.step()
    running[0].engine.step()
    assert [token for delta in [d async for d in generation] for token in delta.token_ids] == [0, 1]
    return generation.worker_id


async def test_a_prompt_goes_to_who_holds_its_blocks(
    master: Master, start_worker: StartWorker
) -> None:
    a, b = await start_worker("a"), await start_worker("b")
    await master.sees(a="ready", b="ready")
    for holder, salt in ((a, "left"), (b, "right")):
        holder.hold(PROMPT, salt)
    await until(lambda: num_held(master, a) == num_held(master, b) == 10)
    assert await finish(master, request("r1", salt="left"), a, b) == "a"
    assert await finish(master, request("r2", salt="right"), a, b) == "b"
    lines = master.backend.explain(request("r3", salt="other"))
    assert [sum(line["prefix_blocks"].values()) for line in lines] == [0, 0]
    text = master.metrics.render().decode()
    assert 'xllm_ttft_estimate_error_seconds_count{worker="a"} 1.0' in text


async def test_a_holder_that_is_busy_is_fetched_from(
    master: Master, start_worker: StartWorker
) -> None:
    a = await start_worker("a", block_address="10.0.0.1:9")
    b = await start_worker("b", block_address="10.0.0.2:9")
    a.load |= {"queue_s": 5.0}
    b.load |= {"tier_block_s": {"peer": PEER_BLOCK_S}}
    await master.sees(a="ready", b="ready")
    b.hold(PROMPT[: 2 * BLOCK])
    a.hold(PROMPT)
    await until(lambda: num_held(master, a) == 10 and num_held(master, b) == 2)

    def is_to_fetch() -> bool:
        first = master.backend.explain(request("e"))[0]
        return first["worker_id"] == "b" and first["fetch"] is not None

    await until(is_to_fetch)
    generation = master.backend.generate(request("r"))
    await until(lambda: bool(b.engine.running))
    (fetch,) = b.engine.running[0].request.fetch
    assert (fetch.worker_id, fetch.address, fetch.first, fetch.count) == ("a", "10.0.0.1:9", 2, 8)
    # Its worker dies, and the other one needs nothing from anybody.
    await b.die()
    tokens = asyncio.ensure_future(anext(aiter(generation)))
    await until(lambda: bool(a.engine.running))
    moved = a.engine.running[0].request
    assert (moved.attempt, moved.fetch) == (1, [])
    a.engine.step()
    assert (await tokens).token_ids == [0]
    generation.cancel()


async def test_nothing_is_fetched_from_who_serves_no_blocks(
    master: Master, start_worker: StartWorker
) -> None:
    a, b = await start_worker("a"), await start_worker("b")
    a.load |= {"queue_s": 5.0}
    b.load |= {"tier_block_s": {"peer": PEER_BLOCK_S}}
    await master.sees(a="ready", b="ready")
    a.hold(PROMPT)
    await until(lambda: num_held(master, a) == 10)
    await until(lambda: master.backend.explain(request("e"))[0]["worker_id"] == "b")
    assert [line["fetch"] for line in master.backend.explain(request("r"))] == [None, None]


async def test_a_worker_that_still_answers_keeps_its_blocks_and_a_lost_one_does_not(
    master: Master, client: EtcdClient, start_worker: StartWorker
) -> None:
    a, _ = await start_worker("a"), await start_worker("b")
    await master.sees(a="ready", b="ready")
    a.hold(PROMPT)
    await until(lambda: num_held(master, a) == 10)
    await client.delete("/xllm/test/workers/a")
    await master.sees(a="suspect", b="ready")
    await until(lambda: master.index.view.is_idle)
    assert num_held(master, a) == 10
    await a.die()
    await master.sees(b="ready")
    await until(lambda: num_held(master, a) == 0)
    assert b'worker="a"' not in master.metrics.render()


async def test_a_worker_without_events_is_named(
    master: Master, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    await start_worker("loud")
    await start_worker("mute", publishes=False)
    await master.sees(loud="ready", mute="ready")
    await until(lambda: master.index.view.workers_without_events() == ["mute"])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        await until(lambda: "no_cache_events" in caplog.text)
    assert "worker_id=mute" in caplog.text
    assert "worker_id=loud" not in caplog.text
    master.index.collect()
    assert b"xllm_index_workers_without_events 1.0" in master.metrics.render()


async def test_with_targets_what_comes_too_late_is_refused_unless_it_is_urgent(
    client: EtcdClient, start_worker: StartWorker
) -> None:
    master = Master(client, "SLO_AWARE")
    try:
        a = await start_worker("a")
        a.load |= {"queue_s": 3.0}
        await master.sees(a="ready")
        await until(lambda: master.backend.explain(request("e"))[0]["backlog_s"] > 2)
        with pytest.raises(Overloaded, match="--target_ttft") as refused:
            master.backend.generate(request("r"))
        assert refused.value.retry_after_s == 3
        assert await finish(master, request("urgent", priority=-1), a) == "a"
    finally:
        await master.stop()


async def test_the_leader_has_a_hot_prefix_fetched_ahead_of_requests(
    master: Master, client: EtcdClient, start_worker: StartWorker
) -> None:
    a = await start_worker("a", block_address="10.0.0.1:9")
    await start_worker("b", block_address="10.0.0.2:9")
    await master.sees(a="ready", b="ready")
    a.hold(PROMPT)
    await until(lambda: num_held(master, a) == 10)
    desk = CommandDesk(client, KEYS, MasterId("master"))
    leads = False
    duty = asyncio.create_task(master.hot.run(desk, lambda: leads))
    generations = [
        master.backend.generate(request(f"r{i}", [*PROMPT, *range(i, i + BLOCK)]))
        for i in range(50)
    ]
    await asyncio.sleep(2 * hot_prefix_duty.PERIOD_S)
    assert (await client.range(KEYS.commands)).kvs == (), "somebody else leads"
    leads = True

    async def commands() -> list[Command]:
        kvs = (await client.range(KEYS.commands)).kvs
        return [command for kv in kvs if (command := decode_command(kv.value)) is not None]

    async with asyncio.timeout(5):
        while not (found := await commands()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    (command,) = found
    assert (command.kind, command.worker_id) == (CommandKind.MOVE, "b")
    assert command.fetch == [FetchRange(WorkerId("a"), "10.0.0.1:9", 0, 8)]
    root = master.cluster.registry.cache_root("m")
    assert split_names(command.blocks) == hash_blocks(root.hash(), PROMPT, BLOCK)[:8]
    duty.cancel()
    for generation in generations:
        generation.cancel()
