"""The default model against `transformers`: greedy tokens in float32, rounding in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.golden.fixtures import GoldenPrompt, evaluated_rows, load_golden_prompts
from tests.golden.harness import prompt_logits
from tests.golden.matrix import CHUNKED, UNCHUNKED, run_prompts, running_engine
from xllm.config import EngineConfig
from xllm.engine.kernels import select
from xllm.engine.runner import Runner

pytestmark = pytest.mark.timeout(300)  # a model's worth of work, on whatever machine

NUM_TOKENS = 32
LENGTHS = (5, 33, 150, 333, 640, 1500)
"""Prose, but for a table, code and other scripts at 150, 333 and 640."""


@pytest.fixture(scope="module")
def prompts() -> list[GoldenPrompt]:
    by_length = {len(prompt.prompt_ids): prompt for prompt in load_golden_prompts()}
    return [by_length[length] for length in LENGTHS]


async def test_alone_and_unchunked(prompts: list[GoldenPrompt], default_model_folder: Path) -> None:
    async with running_engine(UNCHUNKED, default_model_folder) as engine:
        outcomes = await run_prompts(engine, prompts, NUM_TOKENS, together=False, salt="")
    assert [
        prompt.mismatch(outcome.output_ids)
        for prompt, outcome in zip(prompts, outcomes, strict=True)
    ] == [None] * len(prompts)


async def test_batched_and_chunked_cold_and_warm(
    prompts: list[GoldenPrompt], default_model_folder: Path
) -> None:
    async with running_engine(CHUNKED, default_model_folder) as engine:
        for is_warm in (False, True):
            outcomes = await run_prompts(engine, prompts, NUM_TOKENS, together=True, salt="")
            for prompt, outcome in zip(prompts, outcomes, strict=True):
                assert prompt.mismatch(outcome.output_ids) is None
                has_full_block = len(prompt.prompt_ids) >= engine.kv_cache.block_size
                assert (outcome.num_cached_tokens > 0) == (is_warm and has_full_block)


def test_bfloat16_is_as_exact_as_the_oracles(
    prompts: list[GoldenPrompt], default_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of rounding to bfloat16, against at most 1.2 times that of `transformers`; also
    on torch alone, which is what a machine without a compiler gets."""
    base = EngineConfig(device="cpu", max_model_len=max(LENGTHS), max_cache_size=128 << 20)
    wide = Runner(replace(base, dtype="float32"), default_model_folder)
    native = Runner(replace(base, dtype="bfloat16"), default_model_folder)
    monkeypatch.setattr(select, "_native_pool", lambda num_threads: None)
    fallback = Runner(replace(base, dtype="bfloat16"), default_model_folder)
    for prompt in prompts:
        rows = evaluated_rows(len(prompt.prompt_ids))
        exact = prompt_logits(wide, prompt.prompt_ids, rows)
        is_short = len(prompt.prompt_ids) <= 150  # the fallback is slow
        for runner in (native, fallback) if is_short else (native,):
            rounded = prompt_logits(runner, prompt.prompt_ids, rows)
            error = float(torch.linalg.norm(rounded - exact) / torch.linalg.norm(exact))
            assert 0 < error <= 1.2 * prompt.bfloat16_error, f"{len(prompt.prompt_ids)} tokens"
