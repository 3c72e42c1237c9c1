"""Engines over a real pool on Mooncake Store: the same tokens from it, and whatever fails, a miss."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden.tiny_models import prompt_ids
from tests.mooncake_pool import MooncakePool, why_not
from xllm.cache.store_process import StoreAddress
from xllm.cache.store_tier import StoreTier
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import GenerateRequest, SamplingParams, TokenDelta

VOCAB = 320
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    num_threads=1,
    block_size=16,
    max_cache_size=60 * BLOCK_BYTES,
    max_model_len=300,
    prefetch_timeout=20_000,
)
PROMPT = prompt_ids(200, VOCAB)
NUM_CACHED = 192


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakePool]:
    reason = why_not()
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    pool = MooncakePool(tmp_path_factory.mktemp("pool"), 64 << 20)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


def address(pool: MooncakePool, segment_size: int = 0) -> StoreAddress:
    return StoreAddress(
        protocol="tcp",
        master_server_address=pool.address,
        metadata_server="P2PHANDSHAKE",
        local_hostname="127.0.0.1",
        segment_size=segment_size,
        replica_num=1,
    )


class Worker:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def store(self) -> StoreTier:
        assert self.engine.tiers is not None
        assert self.engine.tiers.store is not None
        return self.engine.tiers.store

    async def generate(self, prompt: list[int], salt: str = "") -> tuple[list[int], dict[str, int]]:
        """Greedy tokens, and cached tokens by tier."""
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        request = GenerateRequest(
            request_id="r", model_id="", prompt_ids=prompt, sampling=sampling, salt=salt
        )
        self.engine.submit(request, deltas.put_nowait)
        tokens: list[int] = []
        cached: dict[str, int] = {}
        while True:
            delta = await asyncio.wait_for(deltas.get(), 60)
            if isinstance(delta, RequestError):
                raise delta
            tokens += delta.token_ids
            cached = cached or delta.cached_tokens_by_tier
            if delta.finish_reason is not None:
                return tokens, {tier: n for tier, n in cached.items() if n}

    async def clear_device(self) -> None:
        await self.engine.call(lambda: self.engine.cache_admin.clear(TierName.DEVICE))

    async def until(self, condition) -> None:
        async with asyncio.timeout(60):
            while not await self.engine.call(condition):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.005)

    async def attached(self) -> None:
        await self.until(lambda: self.store.is_attached)

    async def detached(self) -> None:
        await self.until(lambda: not self.store.is_attached)

    async def settle(self) -> None:
        tiers = self.engine.tiers
        assert tiers is not None
        await self.until(lambda: tiers.is_idle)
        await self.engine.call(tiers.check_invariants)


@asynccontextmanager
async def working(
    folder: Path, store: StoreAddress, config: EngineConfig = CONFIG
) -> AsyncIterator[Worker]:
    runner = await asyncio.to_thread(Runner, config, folder)
    engine = await asyncio.to_thread(Engine, runner, LowerTiersFactory(runner, store=store))
    await engine.start()
    try:
        yield Worker(engine)
    finally:
        await engine.stop()


async def test_blocks_outlive_their_workers(pool: MooncakePool, tiny_llama: Path) -> None:
    async with working(tiny_llama, address(pool)) as first:
        await first.attached()
        cold, cached = await first.generate(PROMPT)
        assert cached == {}
        await first.settle()
        assert first.store.counters.num_stored == 12
        await first.clear_device()
        assert await first.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
    async with working(tiny_llama, address(pool)) as second:
        await second.attached()
        assert await second.generate(PROMPT) == (cold, {"remote": NUM_CACHED})
        assert second.store.counters.num_asks == 1
        assert await second.generate(PROMPT) == (cold, {"device": NUM_CACHED})
