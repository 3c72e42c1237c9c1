"""Random models of every supported architecture, small enough to be made when a test needs one.

The weights are a hash of their names and places, so nothing but the oracle's outputs has to be
committed, and they are the same on every machine.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

_BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class TinyModel:
    config: dict[str, Any]
    num_shards: int = 1


def _model(architecture: str, model_type: str, *, num_shards: int = 1, **changes: Any) -> TinyModel:
    config = _BASE | {"architectures": [architecture], "model_type": model_type} | changes
    return TinyModel(config, num_shards)


TINY_MODELS = {
    "llama": _model("LlamaForCausalLM", "llama", rope_theta=10000.0, tie_word_embeddings=True),
    "llama_bias_untied_sharded": _model(
        "LlamaForCausalLM",
        "llama",
        num_shards=3,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_theta=10000.0,
    ),
    "llama_rope_llama3": _model(
        "LlamaForCausalLM",
        "llama",
        tie_word_embeddings=True,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_rope_linear": _model(
        "LlamaForCausalLM",
        "llama",
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "mistral": _model(
        "MistralForCausalLM",
        "mistral",
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=None,
        tie_word_embeddings=False,
        rope_theta=1000000.0,
    ),
    "qwen2": _model(
        "Qwen2ForCausalLM",
        "qwen2",
        use_sliding_window=False,
        sliding_window=64,
        tie_word_embeddings=True,
        rope_theta=1000000.0,
    ),
    "qwen2_rope_yarn": _model(
        "Qwen2ForCausalLM",
        "qwen2",
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rope_scaling={
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3": _model(
        "Qwen3ForCausalLM",
        "qwen3",
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_theta=1000000.0,
    ),
    "qwen3_rope_yarn": _model(
        "Qwen3ForCausalLM",
        "qwen3",
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 0.9,
            "beta_fast": 16.0,
            "truncate": False,
        },
    ),
}


def write_model(folder: Path, model: TinyModel, *, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face folder whose tokenizer.json is empty: the engine only wants it to exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config, indent=1))
    (folder / "tokenizer.json").write_text("{}")
    names = tensor_shapes(model.config)
    tensors = {name: _tensor(name, shape).to(dtype) for name, shape in names.items()}
    if model.num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(model.num_shards):
        file_name = f"model-{shard + 1:05}-of-{model.num_shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard :: model.num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    kind = config["model_type"]
    qkv_bias = kind == "qwen2" or config.get("attention_bias", False)
    o_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }

    def linear(name: str, rows: int, columns: int, has_bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{prefix}.self_attn.q_proj", query, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.k_proj", kv, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.v_proj", kv, hidden, qkv_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, query, o_bias)
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, mlp_bias)
        if kind == "qwen3":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (head,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (head,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def prompt_ids(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids that look random and are the same everywhere."""
    hashed = _splitmix64(np.arange(length, dtype=np.uint64) + np.uint64(seed << 32))
    return [int(value) for value in 3 + hashed % np.uint64(vocab_size - 3)]


def _tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Uniform, with a spread that keeps activations near one; norms are around one."""
    count = int(np.prod(shape))
    start = np.uint64(zlib.crc32(name.encode()) << 32)
    hashed = _splitmix64(np.arange(count, dtype=np.uint64) + start)
    values = (hashed >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    if name.endswith("norm.weight"):
        values = 1 + 0.3 * values
    elif name.endswith(".bias"):
        values *= 0.3
    else:
        values *= (3 / shape[-1]) ** 0.5 * 1.2
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _splitmix64(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
