"""Workers that fetch blocks of each other: real engines, real sockets, and peers that fail."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.golden.tiny_models import TINY_MODELS, prompt_ids, write_model
from xllm.cache.peer_client import PeerLimits
from xllm.cache.peer_server import PeerServer
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory, peer_layout
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import FetchRange, GenerateRequest, SamplingParams, TokenDelta, WorkerId

VOCAB = 320
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
"""Of the tiny llama, at 16 tokens a block in float32."""

CONFIG = EngineConfig(
    device="cpu",
    dtype="float32",
    num_threads=1,
    block_size=16,
    max_cache_size=60 * BLOCK_BYTES,
    max_model_len=300,
    prefetch_timeout=20_000,
)
A, B = WorkerId("a"), WorkerId("b")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", TINY_MODELS["llama"])


class Worker:
    """An engine that serves peers."""

    def __init__(self, engine: Engine, server: PeerServer, address: str) -> None:
        self.engine = engine
        self.server = server
        self.address = address

    async def generate(
        self, prompt: list[int], *, fetch: list[FetchRange] | None = None, salt: str = ""
    ) -> tuple[list[int], dict[str, int]]:
        """Greedy tokens, and cached tokens by tier."""
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        request = GenerateRequest(
            request_id="r",
            model_id="",
            prompt_ids=prompt,
            sampling=sampling,
            salt=salt,
            fetch=fetch or [],
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

    def holds(self, prompt: list[int], worker_id: WorkerId = A) -> list[FetchRange]:
        return [FetchRange(worker_id, self.address, 0, len(prompt) // 16)]

    async def clear(self, *tiers: TierName) -> None:
        for tier in tiers:
            await self.engine.call(lambda tier=tier: self.engine.cache_admin.clear(tier))  # type: ignore[misc]

    async def settle(self) -> None:
        tiers = self.engine.tiers
        assert tiers is not None
        async with asyncio.timeout(60):
            while not await self.engine.call(lambda: tiers.is_idle):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(
    config: EngineConfig,
    folder: Path,
    worker_id: WorkerId = A,
    limits: PeerLimits | None = None,
) -> AsyncIterator[Worker]:
    runner = await asyncio.to_thread(Runner, config, folder)
    factory = LowerTiersFactory(runner, peer_id=worker_id, peer_limits=limits)
    engine = await asyncio.to_thread(Engine, runner, factory)
    await engine.start()
    assert engine.tiers is not None
    assert engine.tiers.lender is not None
    layout = peer_layout(runner, engine.root)
    server = PeerServer(worker_id, layout, engine.tiers.lender, engine.cache_lock)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    server.start(listening)
    try:
        yield Worker(engine, server, address)
    finally:
        await asyncio.to_thread(server.close)
        await engine.stop()


@pytest.mark.parametrize("tier", [TierName.DEVICE, TierName.HOST, TierName.DISK])
async def test_the_tokens_are_the_same_from_every_tier_of_a_peer(
    tiny_llama: Path, tmp_path: Path, tier: TierName
) -> None:
    config = CONFIG
    if tier is not TierName.DEVICE:
        config = replace(
            config,
            host_cache_size=1 << 20,
            disk_cache_dir=str(tmp_path / "disk"),
            disk_cache_size=2 << 20,
            disk_write_policy="write_through",
        )
    prompt = prompt_ids(250, VOCAB)
    async with running(config, tiny_llama) as a, running(CONFIG, tiny_llama, B) as b:
        expected, _ = await a.generate(prompt)
        if tier is not TierName.DEVICE:
            await a.settle()
            above = [TierName.DEVICE, TierName.HOST][: 1 if tier is TierName.HOST else 2]
            await a.clear(*above)
        assert await b.generate(prompt, fetch=a.holds(prompt)) == (expected, {"remote": 240})
        assert await b.generate(prompt) == (expected, {"device": 240})
        statistics = a.engine.tiers.statistics()  # type: ignore[union-attr]
        assert statistics.lent is not None
        assert statistics.lent.served[tier] == 15
        assert await b.generate(prompt, salt="other", fetch=a.holds(prompt)) == (expected, {})
        assert a.engine.tiers.statistics().lent.num_missed == 15  # type: ignore[union-attr]
