"""Converts a GGUF file of a Llama model into an ordinary Hugging Face folder, weights in bfloat16.

It exists for the default model, whose weights are on the package index only as GGUF, so it knows
the one architecture (`llama`) and the one tokenizer (`gpt2` BPE, pre-tokenizer `smollm`) that this
model has, and refuses the rest. Quantised tensors are dequantised to float32, then rounded once.

Torch is not needed: a bfloat16 is the upper half of a float32.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize

from xllm.errors import ConfigError

_TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes safetensors, configs, tokenizer and chat template into the existing `folder`.

    Raises: ConfigError if the file holds another architecture or tokenizer.
    """
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _check_supported(gguf_path, fields)
    tensor_names = {tensor.name for tensor in reader.tensors}

    config = _model_config(fields, tied="output.weight" not in tensor_names)
    _write_weights(reader, config, folder / "model.safetensors")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _special_ids(fields))
    _write_json(folder / "tokenizer.json", _tokenizer(fields))
    special_tokens = _special_tokens(fields)
    _write_json(folder / "special_tokens_map.json", special_tokens)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **special_tokens,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    template = fields["tokenizer.chat_template"]
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_supported(path: Path, fields: dict[str, Any]) -> None:
    kind = [
        fields.get(name)
        for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    ]
    if kind != ["llama", "gpt2", "smollm"]:
        raise ConfigError(
            f"{path}: architecture and tokenizer are {kind}, only llama, gpt2 and smollm can be"
            " converted; use the model's Hugging Face folder"
        )


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    num_heads = fields["llama.attention.head_count"]
    hidden_size = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # Stored as float32; its shortest decimal is the number that was meant.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        **_special_ids(fields),
    }


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _special_tokens(fields: dict[str, Any]) -> dict[str, str]:
    ids = {**_special_ids(fields), "unk_token_id": fields["tokenizer.ggml.unknown_token_id"]}
    tokens = fields["tokenizer.ggml.tokens"]
    return {name.removesuffix("_id"): tokens[token_id] for name, token_id in ids.items()}


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` of byte-level BPE, each digit a token, nothing added around a text."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    token_types: list[int] = fields["tokenizer.ggml.token_type"]
    added_tokens = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, token_types, strict=True))
        if kind == TokenType.CONTROL
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _write_weights(reader: GGUFReader, config: dict[str, Any], path: Path) -> None:
    """Writes the safetensors format: length of the header, header in JSON, then the tensors.

    By hand, because numpy has no bfloat16 to give to the library; one tensor at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        begin, end = end, end + 2 * int(tensor.n_elements)
        # GGUF lists the fastest dimension first.
        shape = [int(size) for size in reversed(tensor.shape)]
        name = _hugging_face_name(tensor.name)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in reader.tensors:
            file.write(to_bfloat16(_weight(tensor, config)).tobytes())


def _hugging_face_name(name: str) -> str:
    if name in _TENSOR_NAMES:
        return _TENSOR_NAMES[name]
    _, layer, kind = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[kind]}"


def _weight(tensor: ReaderTensor, config: dict[str, Any]) -> npt.NDArray[np.float32]:
    """A tensor in float32, its rows in Hugging Face's order."""
    weight: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
        return _rotary_halves(weight, config["num_attention_heads"])
    if tensor.name.endswith("attn_k.weight"):
        return _rotary_halves(weight, config["num_key_value_heads"])
    return weight


def _rotary_halves(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key projection: from rotary pairs side by side to one half each.

    GGUF's kernels rotate rows (2i, 2i+1) of a head together, Hugging Face's (i, i + D/2).
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = 0x7FFF + ((bits >> 16) & 1)
    return ((bits + rounding) >> 16).astype(np.uint16)
