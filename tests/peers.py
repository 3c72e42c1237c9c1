"""Workers that fetch blocks of each other, without a cluster: engines and their peer servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from xllm.cache.lender import LendCounters, Lender
from xllm.cache.peer_client import PeerLimits
from xllm.cache.peer_server import PeerServer
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory, peer_layout
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import FetchRange, GenerateRequest, SamplingParams, TokenDelta, WorkerId

A, B = WorkerId("a"), WorkerId("b")


class Worker:
    """An engine that serves peers."""

    def __init__(self, engine: Engine, server: PeerServer, address: str) -> None:
        self.engine = engine
        self.server = server
        self.address = address

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        fetch: Sequence[FetchRange] = (),
        salt: str = "",
        max_tokens: int = 6,
        timeout_s: float = 60.0,
    ) -> tuple[list[int], dict[str, int]]:
        """Greedy tokens, and cached tokens by tier."""
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = GenerateRequest(
            request_id="r",
            model_id="",
            prompt_ids=list(prompt),
            sampling=sampling,
            salt=salt,
            fetch=list(fetch),
        )
        self.engine.submit(request, deltas.put_nowait)
        tokens: list[int] = []
        cached: dict[str, int] = {}
        while True:
            delta = await asyncio.wait_for(deltas.get(), timeout_s)
            if isinstance(delta, RequestError):
                raise delta
            tokens += delta.token_ids
            cached = cached or delta.cached_tokens_by_tier
            if delta.finish_reason is not None:
                return tokens, {tier: n for tier, n in cached.items() if n}

    def holds(self, prompt: Sequence[int], worker_id: WorkerId = A) -> list[FetchRange]:
        """The whole prompt, to be fetched from here."""
        num_blocks = len(prompt) // self.engine.root.block_size
        return [FetchRange(worker_id, self.address, 0, num_blocks)]

    async def clear(self, *tiers: TierName) -> None:
        for tier in tiers:
            await self.engine.call(lambda tier=tier: self.engine.cache_admin.clear(tier))  # type: ignore[misc]

    @property
    def lender(self) -> Lender:
        assert self.engine.tiers is not None
        assert self.engine.tiers.lender is not None
        return self.engine.tiers.lender

    async def lent(self) -> LendCounters:
        """When all has been given back: a peer has its blocks a moment before that."""
        async with asyncio.timeout(30):
            while await self.engine.call(lambda: self.lender.num_loans):  # noqa: ASYNC110 - polled
                await asyncio.sleep(0.002)
        return await self.engine.call(self.lender.snapshot)

    async def settle(self) -> None:
        """Until no transfer runs."""
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
    lender, books = engine.tiers.lender, engine.books
    server = PeerServer(worker_id, layout, lender, books, is_busy=lambda: engine.is_busy)
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    server.start(listening)
    try:
        yield Worker(engine, server, address)
    finally:
        await asyncio.to_thread(server.close)
        await engine.stop()
