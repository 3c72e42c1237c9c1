"""What an engine's tiers hold is what masters read in etcd: a model, tiers, a disk, a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from etcd_server import EtcdServer, until

from tests.golden.tiny_models import prompt_ids
from xllm.cache.event_codec import TierCode, short_hash
from xllm.cache.index import CacheIndex
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.coordination import EtcdClient, Keys, Session
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import GenerateRequest, SamplingParams, TokenDelta, WorkerId
from xllm.roles.cache_upload import CacheUpload
from xllm.roles.index_reader import IndexReader
from xllm.roles.index_view import IndexView
from xllm.telemetry import Metrics

KEYS = Keys("test")
A = WorkerId("127.0.0.1:1")
VOCAB = 320
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    num_threads=1,
    block_size=16,
    max_cache_size=40 * BLOCK_BYTES,
    max_model_len=300,
    host_cache_size=30 * 4096,
    disk_cache_size=2 << 20,
    disk_write_policy="write_through",
)


@dataclass
class Worker:
    engine: Engine
    upload: CacheUpload
    session: Session
    metrics: Metrics

    async def generate(self, prompt: list[int]) -> None:
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        request = GenerateRequest(request_id="r", model_id="", prompt_ids=prompt, sampling=sampling)
        self.engine.submit(request, deltas.put_nowait)
        while not (isinstance(delta := await deltas.get(), TokenDelta) and delta.finish_reason):
            assert isinstance(delta, TokenDelta)

    async def held(self) -> dict[TierCode, set[int]]:
        """By the tiers' own books, between two steps."""
        engine = self.engine

        def read() -> dict[TierCode, set[int]]:
            held: dict[TierCode, set[int]] = {tier: set() for tier in TierCode}
            pool = engine.kv_cache.pool
            names = (pool.hash_of(block_id) for block_id in range(pool.num_blocks))
            held[TierCode.DEVICE] = {short_hash(name) for name in names if name is not None}
            assert engine.tiers is not None
            for tier, part in (
                (TierCode.HOST, engine.tiers.host),
                (TierCode.DISK, engine.tiers.disk),
            ):
                if part is not None and part.table is not None:
                    held[tier] = {short_hash(name) for name in part.table.hashes()}
            return held

        return await engine.call(read)


@dataclass
class Master:
    index: CacheIndex
    view: IndexView

    async def knows(self, worker: Worker) -> bool:
        """Exactly what the worker holds, in each tier."""
        held = await worker.held()
        if not self.view.is_idle or self.index.num_held(A) != [
            len(held[tier]) for tier in TierCode
        ]:
            return False
        return all(
            (A, tier) in self.index.holders(block) for tier in TierCode for block in held[tier]
        )


@asynccontextmanager
async def in_background(*runs: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(run()) for run in runs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


@asynccontextmanager
async def worker_of(
    client: EtcdClient, folder: Path, config: EngineConfig
) -> AsyncIterator[Worker]:
    """As `roles/worker.py` puts it together."""
    session = Session(client, 2)
    metrics = Metrics()
    upload = CacheUpload(session, KEYS, A, metrics)
    runner = await asyncio.to_thread(Runner, config, folder)
    engine = await asyncio.to_thread(Engine, runner, LowerTiersFactory(runner))
    engine.cache_news.listener = upload.hear
    await engine.start()
    try:
        async with in_background(session.run):
            await session.register(KEYS.worker(A), b"{}", exclusive=True)
            async with in_background(upload.run):
                yield Worker(engine, upload, session, metrics)
    finally:
        await session.close()
        await engine.stop()


@asynccontextmanager
async def master_of(client: EtcdClient) -> AsyncIterator[Master]:
    index = CacheIndex()
    view = IndexView(KEYS, index)
    async with in_background(IndexReader(client, KEYS, view).run):
        yield Master(index, view)


def prompts(count: int, seed: int) -> list[list[int]]:
    return [prompt_ids(Random(seed + i).randrange(40, 200), VOCAB, seed + i) for i in range(count)]


async def test_the_index_is_what_every_tier_holds_also_after_a_restart_and_a_wiped_etcd(
    etcd: EtcdServer, client: EtcdClient, tiny_llama: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, disk_cache_dir=str(tmp_path / "disk"))
    async with master_of(client) as master:
        async with worker_of(client, tiny_llama, config) as worker:
            for prompt in prompts(12, 0):
                await worker.generate(prompt)
            await until(lambda: master.knows(worker), within_s=15)
            held = await worker.held()
            assert all(held[tier] for tier in (TierCode.DEVICE, TierCode.HOST, TierCode.DISK))
            assert len(held[TierCode.DISK]) > len(held[TierCode.DEVICE]), "nothing was evicted"

            await worker.engine.call(lambda: worker.engine.cache_admin.clear(TierName.HOST))
            await until(lambda: master.knows(worker), within_s=15)
            assert master.index.num_held(A)[TierCode.HOST] == 0

            epoch = worker.session.epoch
            etcd.wipe()
            await worker.generate(prompts(1, 100)[0])
            etcd.start()
            await until(lambda: worker.session.epoch != epoch, within_s=15)
            await until(lambda: master.knows(worker), within_s=15)
            assert master.index.statistics().num_workers == 1
        await until(lambda: master.index.statistics().num_blocks == 0)
        async with worker_of(client, tiny_llama, config) as worker:
            await until(lambda: master.knows(worker), within_s=15)
            held = await worker.held()
            assert held[TierCode.DISK]
            assert not held[TierCode.DEVICE]
        rendered = worker.metrics.render().decode()
        assert "xllm_index_upload_puts_total" in rendered


async def test_nobody_listens_and_events_do_not_pile_up(tiny_llama: Path) -> None:
    runner = await asyncio.to_thread(Runner, CONFIG, tiny_llama)
    engine = await asyncio.to_thread(Engine, runner, LowerTiersFactory(runner))
    await engine.start()
    worker = Worker(engine, None, None, Metrics())  # type: ignore[arg-type]
    for prompt in prompts(3, 0):
        await worker.generate(prompt)
    await engine.call(lambda: None)
    assert await engine.call(engine.kv_cache.pool.take_events) == []
    await engine.stop()
