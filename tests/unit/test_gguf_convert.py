from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from xllm.errors import ConfigError
from xllm.gguf_convert import convert_gguf, to_bfloat16

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 8, 32, 2
TOKENS = ["<|end|>", "<|im|>", "a", "b", "ab", "1", "2", "\u0120", "\u0120a"]


def _weights(*, untied: bool = False) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    if untied:
        shapes["output"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "attn_q": (HEADS * HEAD_DIM, HIDDEN),
                "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
                "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
                "attn_output": (HIDDEN, HEADS * HEAD_DIM),
                "ffn_norm": (HIDDEN,),
                "ffn_gate": (64, HIDDEN),
                "ffn_up": (64, HIDDEN),
                "ffn_down": (HIDDEN, 64),
            }.items()
        }
    return {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def _write_gguf(
    path: Path, weights: dict[str, npt.NDArray[np.float32]], *, pre: str = "smollm"
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "\u0120 a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _convert(folder: Path, *, untied: bool = False) -> dict[str, npt.NDArray[np.float32]]:
    weights = _weights(untied=untied)
    _write_gguf(folder / "model.gguf", weights)
    convert_gguf(folder / "model.gguf", folder)
    return weights


def _read_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """By hand: the library gives no bfloat16 to numpy."""
    data = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header_bytes % 8 == 0
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16"
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(data[begin:end], dtype=np.uint16).astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def test_tensors_have_their_hugging_face_names_and_values(tmp_path: Path) -> None:
    weights = _convert(tmp_path)
    tensors = _read_safetensors(tmp_path / "model.safetensors")

    assert len(tensors) == len(weights)
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }.items():
        np.testing.assert_allclose(tensors[ours], weights[theirs], rtol=2**-8)


@pytest.mark.parametrize(("name", "num_heads"), [("q", HEADS), ("k", KV_HEADS)])
def test_rotary_pairs_become_halves(tmp_path: Path, name: str, num_heads: int) -> None:
    weights = _convert(tmp_path)
    tensor = _read_safetensors(tmp_path / "model.safetensors")[
        f"model.layers.0.self_attn.{name}_proj.weight"
    ]
    theirs = weights[f"blk.0.attn_{name}.weight"]
    for head in range(num_heads):
        for row in range(HEAD_DIM):
            half, pair = divmod(row, HEAD_DIM // 2)
            np.testing.assert_allclose(
                tensor[head * HEAD_DIM + row],
                theirs[head * HEAD_DIM + 2 * pair + half],
                rtol=2**-8,
            )


def test_config(tmp_path: Path) -> None:
    _convert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 5000.0
    assert config["max_position_embeddings"] == 256
    assert config["head_dim"] == HEAD_DIM
    assert config["vocab_size"] == len(TOKENS)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def test_an_lm_head_of_its_own_unties_the_embeddings(tmp_path: Path) -> None:
    _convert(tmp_path, untied=True)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in _read_safetensors(tmp_path / "model.safetensors")


def test_tokenizer_splits_digits_and_knows_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    _convert(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab a12<|im|>").tokens == ["ab", "\u0120a", "1", "2", "<|im|>"]
    assert tokenizer.decode(tokenizer.encode("ab 1<|im|>").ids) == "ab 1"
    special_tokens = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special_tokens["eos_token"] == "<|im|>"
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "model.gguf", _weights(), pre="qwen2")
    with pytest.raises(ConfigError, match="qwen2"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_rounding_to_bfloat16() -> None:
    bits = np.array(
        [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x80000000], dtype=np.uint32
    )
    assert [hex(value) for value in to_bfloat16(bits.view(np.float32))] == [
        "0x3f80",  # exact
        "0x3f80",  # a tie, to even
        "0x3f82",  # a tie, to even
        "0x3f81",  # above a tie
        "0xbf80",  # below a tie
        "0x8000",  # minus zero
    ]
