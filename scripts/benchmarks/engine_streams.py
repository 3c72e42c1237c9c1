"""What a client of one engine sees: gaps between tokens while prompts arrive, and prefix hits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.engine_steps import random_tokens
from xllm.engine.engine import Engine
from xllm.engine.runner import Runner
from xllm.engine.running_request import RunningRequest
from xllm.errors import RequestError
from xllm.protocol import GenerateRequest, SamplingParams, TokenDelta

ROUNDS = 5
"""Whose median is the figure: of one round the 99th percentile is its slowest steps, and on a
machine that others use these say more about them."""

_counter = itertools.count()


@dataclass(slots=True, eq=False)
class Stream:
    """One request, and when its tokens came."""

    sent: float
    times: list[float] = field(default_factory=list)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: RequestError | None = None
    handle: RunningRequest | None = None

    def listen(self, item: TokenDelta | RequestError) -> None:
        if isinstance(item, RequestError):
            self.error = item
        else:
            self.times.append(time.perf_counter())
        self.has_begun.set()
        if self.error is not None or (
            isinstance(item, TokenDelta) and item.finish_reason is not None
        ):
            self.has_ended.set()

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between tokens, of the gaps that end in [start, end]."""
        pairs = itertools.pairwise(self.times)
        return [after - before for before, after in pairs if start <= after <= end]


class StreamBench:
    """Drives a started engine."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self._engine = engine
        self._random = rng
        self._stream_prompts = [self.prompt(512) for _ in range(8)]
        """The same each time, so that streams begin at once."""

    def prompt(self, num_tokens: int) -> list[int]:
        return random_tokens(self._random, num_tokens, self._engine.vocab_size)

    def submit(self, prompt_ids: list[int], max_tokens: int) -> Stream:
        stream = Stream(time.perf_counter())
        request = GenerateRequest(
            request_id=f"bench-{next(_counter)}",
            model_id="",
            prompt_ids=prompt_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        )
        stream.handle = self._engine.submit(request, stream.listen)
        return stream

    async def first_token_s(self, prompt_ids: list[int]) -> float:
        stream = self.submit(prompt_ids, 1)
        await stream.has_ended.wait()
        if stream.error is not None:
            raise stream.error
        return stream.times[0] - stream.sent

    @contextlib.asynccontextmanager
    async def streams(self, number: int) -> AsyncIterator[list[Stream]]:
        """So many requests that decode until the end of the block."""
        running = [self.submit(prompt, 6000) for prompt in self._stream_prompts[:number]]
        try:
            for stream in running:
                await stream.has_begun.wait()
                if stream.error is not None:
                    raise stream.error
            yield running
        finally:
            for stream in running:
                assert stream.handle is not None
                stream.handle.cancel()

    async def decode_step_s(self, num_tokens: int = 16) -> float:
        """Median gap of one stream, alone."""
        stream = self.submit(self._stream_prompts[0], num_tokens)
        await stream.has_ended.wait()
        if stream.error is not None:
            raise stream.error
        return median(stream.gaps(0, math.inf))

    async def mixed(
        self, num_streams: int, prompts: Sequence[list[int]]
    ) -> tuple[list[float], float]:
        """Prompts one after the other beside streams: -> the streams' gaps meanwhile, and the
        prompt tokens per second."""
        async with self.streams(num_streams) as running:
            start = time.perf_counter()
            for prompt in prompts:
                await self.first_token_s(prompt)
            end = time.perf_counter()
        gaps = [gap for stream in running for gap in stream.gaps(start, end)]
        return gaps, sum(map(len, prompts)) / (end - start)


@dataclass(slots=True)
class StreamFigures:
    hit_s: float = 0.0
    decode_step_s: float = 0.0
    mixed_p99_s: float = 0.0
    mixed_tokens_per_s: float = 0.0
    alone_tokens_per_s: float = 0.0
    long_p99_s: float = 0.0


async def measure_streams(runner: Runner, rows: frozenset[str]) -> StreamFigures:
    """Fills the figures that `rows` need (hit_4096, tbt_mixed, tbt_long)."""
    engine = Engine(runner)
    await engine.start()
    try:
        bench = StreamBench(engine, random.Random(0))
        figures = StreamFigures()
        async with bench.streams(8):
            pass  # their prompts are in the cache now
        if "hit_4096" in rows:
            await _measure_hit(bench, figures)
        if "tbt_mixed" in rows:
            await _measure_mixed(bench, figures)
        if "tbt_long" in rows:
            await _measure_long(bench, figures)
        return figures
    finally:
        await engine.stop()


async def _measure_hit(bench: StreamBench, figures: StreamFigures) -> None:
    prompt = bench.prompt(4096)
    await bench.first_token_s(prompt)
    hits, steps = [], []
    for _ in range(5):
        steps.append(await bench.decode_step_s())
        hits += [await bench.first_token_s(prompt) for _ in range(3)]
    figures.hit_s, figures.decode_step_s = median(hits), median(steps)


async def _measure_mixed(bench: StreamBench, figures: StreamFigures) -> None:
    await bench.mixed(4, [bench.prompt(2048)])  # the engine learns what such steps cost
    p99s, mixed_rates, alone_rates = [], [], []
    for _ in range(ROUNDS):
        prompt = bench.prompt(2048)
        alone_rates.append(len(prompt) / await bench.first_token_s(prompt))
        gaps, rate = await bench.mixed(4, [bench.prompt(2048) for _ in range(4)])
        p99s.append(percentile(gaps, 0.99))
        mixed_rates.append(rate)
    figures.mixed_p99_s = median(p99s)
    figures.mixed_tokens_per_s = median(mixed_rates)
    figures.alone_tokens_per_s = median(alone_rates)


async def _measure_long(bench: StreamBench, figures: StreamFigures) -> None:
    p99s = []
    for _ in range(ROUNDS):
        gaps, _ = await bench.mixed(8, [bench.prompt(8000)])
        p99s.append(percentile(gaps, 0.99))
    figures.long_p99_s = median(p99s)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
