"""What config.json files mean, and which are refused with which advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.tiny_models import TINY_MODELS
from xllm.engine.model_config import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    load_config,
)
from xllm.errors import ConfigError

BASE = TINY_MODELS["llama"].config


def load(folder: Path, max_model_len: int = 0, **changes: Any) -> DecoderConfig:
    config = {key: value for key, value in (BASE | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return load_config(folder, max_model_len)


def test_llama(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.architecture, config.num_heads, config.num_kv_heads) == (
        "LlamaForCausalLM",
        4,
        2,
    )
    assert config.head_dim == 16
    assert config.qkv_size == 128
    assert config.max_model_len == 512
    assert not any((config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm))
    biased = load(tmp_path, attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.mlp_bias


def test_biases_and_norms_follow_the_architecture(tmp_path: Path) -> None:
    qwen2 = load(tmp_path, architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = load(tmp_path, architectures=["Qwen3ForCausalLM"], head_dim=...)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    ignored = load(
        tmp_path, architectures=["MistralForCausalLM"], attention_bias=True, sliding_window=None
    )
    assert not ignored.qkv_bias


def test_architecture_is_found_by_model_type_too(tmp_path: Path) -> None:
    config = load(tmp_path, architectures=..., model_type="qwen3")
    assert config.architecture == "Qwen3ForCausalLM"


def test_all_eos_ids_count(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2, 5]}')
    assert load(tmp_path, eos_token_id=2).eos_token_ids == (2, 5, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    assert load(tmp_path, eos_token_id=[4, 3]).eos_token_ids == (3, 4)
    assert load(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert load(tmp_path, eos_token_id=[2, 320, -1]).eos_token_ids == (2,)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_in_both_spellings(tmp_path: Path, key: str) -> None:
    def scaling(kind: str, **fields: float) -> Any:
        name = "type" if key == "rope_scaling" else "rope_type"
        return load(tmp_path, **{key: {name: kind, **fields}}).rope_scaling

    assert scaling("default") is None
    assert scaling("linear", factor=4) == LinearScaling(factor=4.0)
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    assert scaling("llama3", original_max_position_embeddings=64, **llama3) == Llama3Scaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    assert scaling("yarn", factor=4, attention_factor=0.7) == YarnScaling(
        factor=4.0, original_max_position_embeddings=512, attention_factor=0.7
    )


def test_theta_of_rope_parameters_wins(tmp_path: Path) -> None:
    assert load(tmp_path, rope_theta=5e5).rope_theta == 5e5
    assert load(tmp_path, rope_theta=..., rope_parameters={"rope_theta": 7.0}).rope_theta == 7.0
    assert load(tmp_path, rope_theta=...).rope_theta == 10_000.0


def test_yarn_extends_what_the_model_was_made_for(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert load(tmp_path, rope_scaling=yarn).max_model_len == 2048


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "Qwen3ForCausalLM"),
        ({"architectures": ..., "model_type": "phi3"}, "LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "unquantized"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "incomplete"),
        ({"rope_parameters": {"factor": "two"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 256}, "--max_model_len=256"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "max_window_layers": 1,
                "sliding_window": 128,
            },
            "--max_model_len=128",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 128,
            },
            "--max_model_len=128",
        ),
    ],
    ids=str,
)
def test_refusals_say_what_works(tmp_path: Path, changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        load(tmp_path, **changes)


def test_a_sliding_window_that_is_never_reached_is_none(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    load(tmp_path, **mistral, sliding_window=None)
    load(tmp_path, **mistral, sliding_window=512)
    load(tmp_path, **mistral)  # the default is 4096
    load(tmp_path, **mistral, sliding_window=256, max_model_len=256)
    load(tmp_path, architectures=["Qwen2ForCausalLM"], sliding_window=64, use_sliding_window=False)


def test_folders_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        load_config(tmp_path)
