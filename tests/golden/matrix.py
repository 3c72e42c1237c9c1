"""Greedy tokens of the engine against the oracle's, in every way a prompt can be computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.golden.fixtures import NUM_OUTPUT_TOKENS, GoldenPrompt, load_golden_prompts
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.runner import Runner
from xllm.errors import RequestError
from xllm.protocol import GenerateRequest, SamplingParams, TokenDelta

_CONFIG = EngineConfig(
    device="cpu", dtype="float32", max_cache_size=2 << 30, max_tokens_per_batch=4096
)

UNCHUNKED = replace(_CONFIG, enable_chunked_prefill=False)
CHUNKED = replace(_CONFIG, max_tokens_per_chunk_for_prefill=200, max_tokens_per_batch=512)
"""Chunks that end within blocks."""


@dataclass(frozen=True)
class Outcome:
    output_ids: list[int]
    num_cached_tokens: int


@asynccontextmanager
async def running_engine(config: EngineConfig, model_folder: Path) -> AsyncIterator[Engine]:
    runner = await asyncio.to_thread(Runner, config, model_folder)
    runner.allocate_cache(runner.num_blocks)
    engine = Engine(runner)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def run_prompts(
    engine: Engine,
    prompts: Sequence[GoldenPrompt],
    num_tokens: int,
    *,
    together: bool,
    salt: str,
) -> list[Outcome]:
    """All at once or one after the other. A salt that was used before makes prefixes warm."""
    if together:
        tasks = [_run_prompt(engine, prompt, num_tokens, salt) for prompt in prompts]
        return list(await asyncio.gather(*tasks))
    return [await _run_prompt(engine, prompt, num_tokens, salt) for prompt in prompts]


async def _run_prompt(engine: Engine, prompt: GoldenPrompt, num_tokens: int, salt: str) -> Outcome:
    deltas: asyncio.Queue[TokenDelta | RequestError] = asyncio.Queue()
    request = GenerateRequest(
        request_id=f"golden-{len(prompt.prompt_ids)}",
        model_id="",
        prompt_ids=prompt.prompt_ids,
        sampling=SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
        salt=salt,
    )
    engine.submit(request, deltas.put_nowait)
    output_ids: list[int] = []
    while True:
        delta = await deltas.get()
        if isinstance(delta, RequestError):
            raise delta
        output_ids += delta.token_ids
        if delta.finish_reason is not None:
            return Outcome(output_ids, delta.cached_tokens)


def run_matrix(model_folder: Path) -> int:
    """Prints a line per way of computing; the exit status."""
    return asyncio.run(_run_matrix(model_folder))


async def _run_matrix(model_folder: Path) -> int:
    prompts = load_golden_prompts()
    num_wrong = 0
    for chunking, config in (("whole prompts", UNCHUNKED), ("chunked", CHUNKED)):
        async with running_engine(config, model_folder) as engine:
            for together in (False, True):
                for prefix in ("cold", "warm"):
                    started = time.monotonic()
                    outcomes = await run_prompts(
                        engine, prompts, NUM_OUTPUT_TOKENS, together=together, salt=str(together)
                    )
                    wrong = [
                        problem
                        for prompt, outcome in zip(prompts, outcomes, strict=True)
                        if (problem := prompt.mismatch(outcome.output_ids))
                    ]
                    num_cached = sum(outcome.num_cached_tokens for outcome in outcomes)
                    print(
                        f"{chunking:13}  {'batched' if together else 'alone':7}  {prefix}  "
                        f"{len(prompts) - len(wrong)}/{len(prompts)} as the oracle  "
                        f"{num_cached:6} tokens cached  {time.monotonic() - started:6.1f} s",
                        flush=True,
                    )
                    for problem in wrong:
                        print(f"    {problem}", flush=True)
                    num_wrong += len(wrong) + (num_cached > 0) - (prefix == "warm")
    print("golden: " + ("identical" if num_wrong == 0 else f"{num_wrong} differences"))
    return 1 if num_wrong else 0
