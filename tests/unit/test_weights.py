"""Tensors out of safetensors files, and the fingerprint that separates fine-tunes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.tiny_models import TINY_MODELS, write_model
from xllm.engine import weights
from xllm.engine.model_config import load_config
from xllm.engine.weights import Checkpoint, fingerprint, weight_files
from xllm.errors import ConfigError

CPU = torch.device("cpu")
SHARDED = TINY_MODELS["llama_bias_untied_sharded"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", TINY_MODELS["qwen2"])


def test_parts_are_fused_across_shards_and_cast(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", SHARDED)
    config = load_config(folder)
    tensors = {}
    for path in weight_files(folder):
        tensors.update(load_file(path))
    assert len(weight_files(folder)) == 3
    with Checkpoint(folder, config, torch.bfloat16, CPU) as checkpoint:
        layer = checkpoint.layer(1)
        head = checkpoint.lm_head()
    prefix = "model.layers.1."
    qkv = [tensors[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(qkv).bfloat16())
    biases = [tensors[f"{prefix}mlp.{part}_proj.bias"] for part in ("gate", "up")]
    assert layer.gate_up_bias is not None
    assert torch.equal(layer.gate_up_bias, torch.cat(biases).bfloat16())
    assert layer.q_norm is None
    assert torch.equal(head, tensors["lm_head.weight"].bfloat16())


def test_tensors_do_not_refer_to_the_file(folder: Path) -> None:
    with Checkpoint(folder, load_config(folder), torch.float32, CPU) as checkpoint:
        embedding = checkpoint.embedding()
    before = embedding.clone()
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(embedding, before)


def test_missing_or_wrong_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    config = load_config(folder)
    tensors = load_file(path)
    wrong = tensors | {"model.norm.weight": torch.ones(63)}
    save_file(wrong, path)
    with (
        Checkpoint(folder, config, torch.float32, CPU) as checkpoint,
        pytest.raises(ConfigError, match=r"model\.norm\.weight.*\[63\].*\[64\]"),
    ):
        checkpoint.final_norm()
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    save_file(tensors, path)
    with (
        Checkpoint(folder, config, torch.float32, CPU) as checkpoint,
        pytest.raises(ConfigError, match=r"k_proj\.bias"),
    ):
        checkpoint.layer(0)


def test_missing_or_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    config = load_config(folder)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        Checkpoint(folder, config, torch.float32, CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks the weights model\.safetensors"):
        weight_files(folder)
    sharded = write_model(tmp_path / "sharded", SHARDED)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00003"):
        weight_files(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ConfigError, match="cannot be used"):
        weight_files(sharded)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(Evil.trap),))

    trap: Path


def test_a_pickle_is_never_loaded(folder: Path, tmp_path: Path) -> None:
    Evil.trap = tmp_path / "trap"
    config = load_config(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        torch.save({"model.norm.weight": Evil()}, folder / name)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        Checkpoint(folder, config, torch.float32, CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks the weights model\.safetensors"):
        Checkpoint(folder, config, torch.float32, CPU)
    assert not Evil.trap.exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="of that folder only"):
        weight_files(folder)


def test_fingerprint_differs_by_one_bit_of_one_weight(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = load_config(folder)
    original = fingerprint(folder, config, cache)
    assert len(original) == 32
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(folder, config, cache) != original
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(folder, config, cache) == original


def test_fingerprint_covers_the_configuration_that_changes_kv(tmp_path: Path) -> None:
    """The same weights under another rotation, scaling or norm are another model."""
    cache = tmp_path / "cache"
    base = TINY_MODELS["llama"]
    folder = write_model(tmp_path / "model", base)
    seen = set()
    for changes in (
        {},
        {"rope_theta": 20000.0},
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    ):
        (folder / "config.json").write_text(json.dumps(base.config | changes))
        seen.add(fingerprint(folder, load_config(folder), cache))
    assert len(seen) == 5
    (folder / "config.json").write_text(json.dumps(base.config | {"eos_token_id": 7}))
    assert fingerprint(folder, load_config(folder), cache) in seen


def test_fingerprint_is_the_contents_not_the_place(folder: Path, tmp_path: Path) -> None:
    copy = write_model(tmp_path / "copy", TINY_MODELS["qwen2"])
    config = load_config(folder)
    cache = tmp_path / "cache"
    assert fingerprint(folder, config, cache) == fingerprint(copy, config, cache)


def test_fingerprint_reads_unchanged_files_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file with the same path, size, mtime and inode is taken for unchanged."""
    monkeypatch.setattr(weights, "_MIN_REMEMBERED_BYTES", 1000)
    cache = tmp_path / "cache"
    config = load_config(folder)
    original = fingerprint(folder, config, cache)
    path = folder / "model.safetensors"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(folder, config, cache) == original
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fingerprint(folder, config, cache) != original


def test_fingerprint_needs_no_writable_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_MIN_REMEMBERED_BYTES", 1000)
    config = load_config(folder)
    blocked = tmp_path / "file"
    blocked.write_text("")
    unwritable = blocked / "cache"
    assert fingerprint(folder, config, unwritable) == fingerprint(folder, config, tmp_path / "ok")
