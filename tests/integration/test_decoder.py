"""The decoder against `transformers`, on random models of every architecture; long contexts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.golden.fixtures import CLOSE_CALL, NUM_TINY_TOKENS, load_fixture
from tests.golden.harness import Lane, generate, make_batch, make_lanes, prompt_logits
from tests.golden.tiny_models import TINY_MODELS, TinyModel, prompt_ids, write_model
from xllm.config import EngineConfig
from xllm.engine.kernels import select
from xllm.engine.model_config import load_config
from xllm.engine.rope import build_cos_sin
from xllm.engine.runner import Runner

CHUNK = 24


def make_runner(folder: Path, **fields: Any) -> Runner:
    defaults = {"dtype": "float32", "device": "cpu", "block_size": 16, "max_cache_size": 16 << 20}
    return Runner(EngineConfig(**(defaults | fields)), folder)


@pytest.fixture(params=["native", "torch"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on both; "torch" is what a machine without a compiler gets."""
    if request.param == "torch":
        monkeypatch.setattr(select, "_native_pool", lambda num_threads: None)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_prompts_and_continuations_are_the_oracles(name: str, tmp_path: Path) -> None:
    """Log-probabilities of every prompt token, then greedy tokens: alone, batched, chunked."""
    runner = make_runner(write_model(tmp_path, TINY_MODELS[name]), num_threads=1)
    golden = load_fixture(f"tiny_{name}")["prompts"]
    vocab_size = runner.model_config.vocab_size
    prompts = [prompt_ids(entry["length"], vocab_size, entry["seed"]) for entry in golden]
    for ids, entry in zip(prompts, golden, strict=True):
        if len(ids) > 1:
            logits = prompt_logits(runner, ids, range(len(ids) - 1))
            following = torch.tensor(ids[1:]).unsqueeze(1)
            logprobs = torch.log_softmax(logits, dim=1).gather(1, following).squeeze(1)
            expected = torch.tensor(entry["prompt_logprobs"])
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-4)
    assert min(min(entry["gaps"]) for entry in golden) > CLOSE_CALL
    expected_ids = [entry["output_ids"] for entry in golden]
    alone = [generate(runner, make_lanes(runner, [ids], 16), 16)[0] for ids in prompts]
    assert alone == expected_ids
    lanes = make_lanes(runner, prompts, NUM_TINY_TOKENS)
    assert generate(runner, lanes, NUM_TINY_TOKENS, chunk=CHUNK) == expected_ids


@pytest.mark.parametrize("decoder", ["native"], indirect=True)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_rotary_tables_are_the_oracles(name: str, tmp_path: Path) -> None:
    golden = torch.tensor(load_fixture(f"tiny_{name}")["cos_sin_at_0_1_63_200_511"])
    config = load_config(write_model(tmp_path, TINY_MODELS[name]))
    table = build_cos_sin(config, 512)[[0, 1, 63, 200, 511]]
    torch.testing.assert_close(table, golden, rtol=0, atol=1e-6)


def test_a_fully_cached_prompt_runs_its_last_token_only(tmp_path: Path) -> None:
    """Slot -1: the block is shared, so nothing is written, and the token is the same."""
    runner = make_runner(write_model(tmp_path, TINY_MODELS["qwen3"]), num_threads=1)
    ids = prompt_ids(64, runner.model_config.vocab_size)
    (lane,) = make_lanes(runner, [ids], 4)
    expected = generate(runner, [lane], 4)[0]
    before = runner.cache[lane.block_table[:4]].clone()
    hit = Lane(list(ids), lane.block_table, num_computed=63, num_written=64)
    assert generate(runner, [hit], 4)[0] == expected
    assert torch.equal(runner.cache[lane.block_table[:4]], before)


def test_copied_blocks_continue_alike(tmp_path: Path) -> None:
    runner = make_runner(write_model(tmp_path, TINY_MODELS["llama"]), num_threads=1)
    ids = prompt_ids(40, runner.model_config.vocab_size)
    original, fork = make_lanes(runner, [ids, ids], 8)
    expected = generate(runner, [original], 8)[0]
    runner.copy_blocks(list(zip(original.block_table[:3], fork.block_table[:3], strict=True)))
    fork.num_computed, fork.num_written = 39, 39
    assert generate(runner, [fork], 8)[0] == expected


def test_weights_in_bfloat16_are_loaded_into_float32(tmp_path: Path) -> None:
    model = TINY_MODELS["mistral"]
    narrow = make_runner(write_model(tmp_path / "narrow", model, dtype=torch.bfloat16))
    wide = make_runner(write_model(tmp_path / "wide", model))
    ids = prompt_ids(20, 320)
    torch.testing.assert_close(
        prompt_logits(narrow, ids, [19]), prompt_logits(wide, ids, [19]), rtol=0, atol=0.2
    )
    assert narrow.kv_dtype == wide.kv_dtype == "float32"
    assert narrow.fingerprint != wide.fingerprint


LONG = TinyModel(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 131_104,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }
)


class DirectModel:
    """`LONG` in float64 numpy, with one query at a time."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        self._weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """[V] after the last token."""
        x = self._weights["model.embed_tokens.weight"][token_ids]
        normed = self._norm(x, "layers.0.input_layernorm")
        positions = np.arange(len(token_ids))
        keys = self._rotate(self._linear(normed, "self_attn.k_proj"), positions)
        query = self._rotate(self._linear(normed[-1:], "self_attn.q_proj"), positions[-1:])[0]
        scores = keys @ query / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        attended = weights @ self._linear(normed, "self_attn.v_proj") / weights.sum()
        x = x[-1] + self._linear(attended, "self_attn.o_proj")
        normed = self._norm(x, "layers.0.post_attention_layernorm")
        gate = self._linear(normed, "mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * self._linear(normed, "mlp.up_proj")
        x = x + self._linear(inner, "mlp.down_proj")
        return self._norm(x, "norm") @ self._weights["model.embed_tokens.weight"].T

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[f"model.layers.0.{name}.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + LONG.config["rms_norm_eps"])
        return x / scale * self._weights[f"model.{name}.weight"]

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = x.shape[1] // 2
        angles = positions[:, None] / LONG.config["rope_theta"] ** (np.arange(half) / half)
        low, high = x[:, :half], x[:, half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=1)


@pytest.mark.parametrize("decoder", ["native"], indirect=True)
def test_a_prompt_of_131072_tokens(tmp_path: Path) -> None:
    """One layer, so K and V depend on their own token alone, and the logits at a few positions
    can be had directly, in float64."""
    folder = write_model(tmp_path, LONG)
    runner = make_runner(folder, block_size=32, max_cache_size=64 << 20)
    direct = DirectModel(folder)
    ids = prompt_ids(131_072, 64)
    (lane,) = make_lanes(runner, [ids], 1)
    num_probed = 0
    while lane.num_remaining:
        batch = make_batch([(lane, min(2048, lane.num_remaining))], runner.block_size)
        logits = runner.logits(batch)[0].numpy()
        lane.num_computed += batch.num_tokens
        if lane.num_computed in (2048, 65_536, 131_072):
            expected = direct.logits(ids[: lane.num_computed])
            # The angles are float32, as the oracle's: at 131,072 they are off by up to 0.004.
            np.testing.assert_allclose(logits, expected, atol=0.02)
            num_probed += 1
    assert num_probed == 3
