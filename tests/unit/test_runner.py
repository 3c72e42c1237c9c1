"""What a runner picks by itself, and what it refuses, on a model small enough to load at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.harness import GREEDY, make_batch, make_lanes
from tests.golden.tiny_models import TINY_MODELS, prompt_ids, write_model
from xllm.config import EngineConfig
from xllm.engine import runner as runner_module
from xllm.engine.runner import Runner, cpu_has_bf16
from xllm.engine.sampler import Draw, SamplingBatch, Score
from xllm.errors import ConfigError

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 8
"""Of the tiny Llama in float32: K and V, layers, KV heads, head size, bytes, tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), TINY_MODELS["llama"])


def make_runner(folder: Path, **fields: Any) -> Runner:
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "num_threads": 1}
    return Runner(EngineConfig(**(defaults | fields)), folder)


def test_the_cache_is_page_first_and_as_large_as_asked_for(folder: Path) -> None:
    runner = make_runner(folder, max_cache_size=100 * BLOCK_BYTES + 5)
    assert runner.block_bytes == BLOCK_BYTES
    assert runner.num_blocks == 100
    assert runner.kv_dtype == "float32"
    runner.allocate_cache(7)
    assert runner.cache.shape == (7, 2, 2, 8, 2, 16)
    assert runner.cache[0].nbytes == BLOCK_BYTES
    assert runner.cache.is_contiguous()


def test_a_cache_below_one_request_names_both_numbers(folder: Path) -> None:
    needed = 512 // 8 * BLOCK_BYTES
    make_runner(folder, max_cache_size=needed)
    with pytest.raises(ConfigError, match=rf"504 tokens.*--max_model_len=512.*{needed} bytes"):
        make_runner(folder, max_cache_size=needed - 1)
    make_runner(folder, max_cache_size=needed - 1, max_model_len=500)


def test_a_default_cache_is_a_quarter_of_what_is_available(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = 4 * 70 * BLOCK_BYTES
    monkeypatch.setattr(runner_module, "available_memory_bytes", lambda: available)
    assert make_runner(folder).num_blocks == 70
    available = 1 << 50
    assert make_runner(folder).num_blocks == (4 << 30) // BLOCK_BYTES
    available = 4 * 10 * BLOCK_BYTES
    with pytest.raises(ConfigError, match="what is available"):
        make_runner(folder)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"max_model_len": 513}, "512"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"device": "cpu:1"}, "cpu, cuda"),
        ({"device": "cuda:x"}, "cpu, cuda"),
        ({"dtype": "float16"}, "bfloat16 or float32"),
    ],
)
def test_refusals_say_what_works(folder: Path, fields: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        make_runner(folder, **fields)


@pytest.mark.parametrize(
    ("cpuinfo", "has_bf16"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
    ],
)
def test_dtype_follows_the_cpu(tmp_path: Path, cpuinfo: str, has_bf16: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert cpu_has_bf16(path) is has_bf16


def test_logits_come_in_slices_of_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of a prompt scored, three rows at a time, and the last row drawn twice."""
    runner = make_runner(folder)
    ids = prompt_ids(20, 320)
    (lane,) = make_lanes(runner, [ids], 1)
    batch = make_batch([(lane, 20)], 8, logits_rows=[*range(19), 19, 19])
    rows = [Score(token_id, 1) for token_id in ids[1:]] + [Draw(GREEDY, i, 0) for i in (0, 1)]
    whole = runner.execute(batch, SamplingBatch(rows))
    monkeypatch.setattr(runner_module, "_MAX_LOGITS_BYTES", 3 * 4 * 320)
    sliced = runner.execute(batch, SamplingBatch(rows))
    assert sliced.token_ids == whole.token_ids
    assert sliced.token_ids[:19] == ids[1:]
    assert sliced.token_ids[19] == sliced.token_ids[20]
    for one, other in zip(sliced.logprobs[:19], whole.logprobs[:19], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_a_step_may_want_no_logits(folder: Path) -> None:
    runner = make_runner(folder)
    (lane,) = make_lanes(runner, [prompt_ids(20, 320)], 1)
    batch = make_batch([(lane, 10)], 8, logits_rows=[])
    assert runner.execute(batch, SamplingBatch([])).token_ids == []


def test_rows_with_damaged_kv_are_faulty_and_harm_no_other(folder: Path) -> None:
    runner = make_runner(folder)
    lanes = make_lanes(runner, [prompt_ids(12, 320, seed) for seed in range(3)], 2)
    runner.cache.zero_()
    runner.cache[lanes[1].block_table[0]] = math.nan
    parts = [(lane, 1) for lane in lanes]
    for lane in lanes:
        lane.num_computed = 11
    draws = [Draw(GREEDY, 0, 0) for _ in lanes]
    sampled = runner.execute(make_batch(parts, 8), SamplingBatch(draws))
    assert sampled.faulty_rows == {1}


def test_blocks_are_copied_whole(folder: Path) -> None:
    runner = make_runner(folder)
    runner.allocate_cache(4)
    runner.cache.copy_(torch.arange(4.0).view(4, 1, 1, 1, 1, 1).expand_as(runner.cache))
    runner.copy_blocks([(1, 0), (3, 2)])
    runner.copy_blocks([])
    assert runner.cache.flatten(1).amax(dim=1).tolist() == [1, 1, 3, 3]
    assert runner.cache.flatten(1).amin(dim=1).tolist() == [1, 1, 3, 3]
