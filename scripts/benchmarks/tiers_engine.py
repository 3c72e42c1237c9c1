"""An engine of this process, for benchmarks of its tiers: hits, steps and stores, measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xllm.cache.tier import TierName
from xllm.cache.tiers import Tiers
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory, check_memory
from xllm.engine.runner import Runner
from xllm.engine.running_request import RunningRequest
from xllm.engine.scheduler import StepPlan
from xllm.engine.timeline import Timeline
from xllm.errors import RequestError
from xllm.protocol import FetchRange, GenerateRequest, SamplingParams, TokenDelta

_generator = np.random.default_rng(0)


def random_prompt(num_tokens: int) -> list[int]:
    """Another one each time."""
    return [int(token) for token in _generator.integers(100, 40_000, num_tokens)]


@dataclass(frozen=True, slots=True)
class Served:
    """One request."""

    seconds: float
    """Submitted to first token."""
    by_tier: dict[str, int]
    """Cached tokens."""
    load_bytes: int
    load_seconds: float
    """From below; of all requests, if others ran beside it."""


class BenchEngine:
    """For one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: list[tuple[int, float]] = []
        engine.observer = self

    def request_begun(self, waited_s: float) -> None:
        pass

    def step_done(self, plan: StepPlan, seconds: float) -> None:
        self._steps.append((plan.num_decodes, seconds))

    def request_ended(self, request: GenerateRequest, timeline: Timeline) -> None:
        pass

    @property
    def tiers(self) -> Tiers:
        tiers = self._engine.tiers
        assert tiers is not None
        return tiers

    @property
    def block_bytes(self) -> int:
        return self.tiers.statistics().block_bytes

    @property
    def stored_bytes(self) -> int:
        statistics = self._engine.statistics().tiers
        return (
            0 if statistics is None else sum(statistics.blocks_stored.values()) * self.block_bytes
        )

    async def ttft(
        self, prompt: list[int], max_tokens: int = 1, fetch: Sequence[FetchRange] = ()
    ) -> Served:
        """Serves a prompt to its end."""
        loaded = self._loaded()
        deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
        started = time.perf_counter()
        self._submit(prompt, max_tokens, deltas, fetch)
        first = delta = await _next(deltas)
        seconds = time.perf_counter() - started
        while delta.finish_reason is None:
            delta = await _next(deltas)
        num_bytes, load_seconds = (b - a for a, b in zip(loaded, self._loaded(), strict=True))
        return Served(seconds, first.cached_tokens_by_tier, int(num_bytes), load_seconds)

    async def settle(self) -> None:
        """Until no transfer is wanted or under way."""
        await self.until(lambda: self.tiers.is_idle)

    async def until(self, condition: Callable[[], bool]) -> None:
        """`condition` is asked on the engine's thread."""
        while not await self._engine.call(condition):  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.01)

    async def clear_above(self, tier: TierName) -> None:
        above = [TierName.DEVICE] if tier is TierName.HOST else [TierName.DEVICE, TierName.HOST]
        for upper in above:
            await self._engine.call(lambda upper=upper: self._engine.cache_admin.clear(upper))

    @asynccontextmanager
    async def decoding(self, num_seqs: int) -> AsyncIterator[None]:
        """So many sequences run meanwhile."""
        running, queues = [], []
        for _ in range(num_seqs):
            deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
            running.append(self._submit(random_prompt(100), 7000, deltas))
            queues.append(deltas)
        for deltas in queues:
            await _next(deltas)
        try:
            yield
        finally:
            for request in running:
                request.cancel()

    async def step_seconds(self, num_steps: int, *, is_writing: bool) -> list[float]:
        """What the next decode steps take; with `is_writing`, while all blocks of the device are
        stored in host and disk, again as soon as they are there."""
        return await self.step_seconds_beside(num_steps, self._store_again if is_writing else None)

    async def step_seconds_beside(
        self, num_steps: int, again: Callable[[], None] | None
    ) -> list[float]:
        """What the next decode steps take while `again` is called, every now and then, between two
        of them."""
        self._steps.clear()
        while len(self._steps) < num_steps:
            if again is not None:
                await self._engine.call(again)
            await asyncio.sleep(0.005)
        return [seconds for num_decodes, seconds in self._steps if num_decodes == 8]

    def _store_again(self) -> None:
        if self.tiers.is_idle:
            self.tiers.clear(TierName.HOST)
            self.tiers.clear(TierName.DISK)
            pool = self._engine.kv_cache.pool
            for name in pool.coldest(pool.num_blocks):
                block_id = pool.lookup(name)
                assert block_id is not None
                self.tiers.committed(name, None, block_id)

    def _submit(
        self,
        prompt: list[int],
        max_tokens: int,
        deltas: asyncio.Queue[TokenDelta | RequestError],
        fetch: Sequence[FetchRange] = (),
    ) -> RunningRequest:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = GenerateRequest(
            request_id="bench",
            model_id="",
            prompt_ids=prompt,
            sampling=sampling,
            fetch=list(fetch),
        )
        return self._engine.submit(request, deltas.put_nowait)

    def _loaded(self) -> tuple[float, float]:
        statistics = self._engine.statistics().tiers
        if statistics is None:
            return 0, 0.0
        return sum(statistics.load_bytes.values()), sum(statistics.load_seconds.values())


@asynccontextmanager
async def running(config: EngineConfig, folder: Path) -> AsyncIterator[BenchEngine]:
    def make() -> Engine:
        runner = Runner(config, folder)
        check_memory(runner)
        return Engine(runner, LowerTiersFactory(runner))

    engine = await asyncio.to_thread(make)
    bench = BenchEngine(engine)
    await engine.start()
    try:
        yield bench
    finally:
        await engine.stop()


async def _next(deltas: asyncio.Queue[TokenDelta | RequestError]) -> TokenDelta:
    delta = await deltas.get()
    if isinstance(delta, RequestError):
        raise delta
    return delta
