"""The host's side of the CUDA decoder without a GPU: FlashInfer is replaced by the reference
kernels behind its interface, and a graph by running the same calls again."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.golden.harness import generate, make_lanes
from tests.golden.tiny_models import TINY_MODELS, prompt_ids, write_model
from xllm.config import EngineConfig
from xllm.engine.batch import Batch
from xllm.engine.kernels import cuda
from xllm.engine.kernels.cuda_graphs import CudaDecoder, _Graph
from xllm.engine.kernels.reference import ReferenceKernels
from xllm.engine.runner import Runner
from xllm.engine.weights import Checkpoint
from xllm.errors import ConfigError

REFERENCE = ReferenceKernels()
NUM_TOKENS = 12


class FakeWrapper:
    """FlashInfer's BatchPrefillWithPagedKVCacheWrapper, as far as it is used."""

    def __init__(self, workspace: torch.Tensor, **options: Any) -> None:
        assert (options["kv_layout"], options["backend"]) == ("NHD", "fa2")
        self._num_indices = len(options.get("paged_kv_indices_buf", range(1 << 30)))

    def plan(self, *arguments: Any, causal: bool, sm_scale: float, **dtypes: Any) -> None:
        self._starts, self._block_starts, self._blocks, self._last_lens = arguments[:4]
        self._shape = arguments[4:]
        assert causal
        assert len(self._blocks) <= self._num_indices
        self._scale = sm_scale

    def run(self, query: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        kv_layer = torch.stack(kv, dim=1)
        _, num_heads, head_dim = query.shape
        block_size, num_kv_heads = kv_layer.shape[2:4]
        assert self._shape == (num_heads, num_kv_heads, head_dim, block_size)
        counts = self._block_starts.diff()
        tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for seq, count in enumerate(counts.tolist()):
            tables[seq, :count] = self._blocks[self._block_starts[seq] :][:count]
        context_lens = (counts - 1) * block_size + self._last_lens
        none = torch.empty(0)
        batch = Batch(
            none, none, none, self._starts, context_lens, tables, none, 0, 0, int(counts.max())
        )
        return REFERENCE.attention(query, batch, kv_layer, self._scale)


def rotate(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    assert is_neox
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    for rows in (query, key):
        heads = rows.view(len(positions), -1, head_size)
        low, high = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))


def write_kv(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, kv: torch.Tensor) -> None:
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, kv.shape[2])
            kv[block, 0, offset], kv[block, 1, offset] = key[row], value[row]


def add_rms_norm_(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, e: float) -> None:
    normed, total = REFERENCE.add_rms_norm(x, residual, weight, e)
    x.copy_(normed)
    residual.copy_(total)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer = SimpleNamespace(
        prefill=SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeWrapper),
        norm=SimpleNamespace(rmsnorm=REFERENCE.rms_norm),
        rope=SimpleNamespace(apply_rope_with_cos_sin_cache_inplace=rotate),
        activation=SimpleNamespace(silu_and_mul=REFERENCE.silu_mul),
    )
    triton = SimpleNamespace(write_kv=write_kv, add_rms_norm_=add_rms_norm_)
    monkeypatch.setattr(cuda, "import_flashinfer", lambda: flashinfer)
    monkeypatch.setattr(cuda, "import_triton_kernels", lambda: triton)
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))


class ReplayingDecoder(CudaDecoder):
    """Captures a step by remembering what it is made of."""

    num_replays = 0

    def _capture(self, size: int, kv_cache: torch.Tensor, pool: Any) -> _Graph:
        attention = self._kernels.graph_attention(size, size * self._max_blocks_per_seq)
        inputs = self._new_inputs(size)
        hidden = torch.empty(0)

        def replay() -> None:
            self.num_replays += 1
            hidden.set_(self._decoder.forward(inputs, kv_cache))

        graph: Any = SimpleNamespace(replay=replay)
        return _Graph(inputs, attention, graph, hidden)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prompts_and_padded_decodes_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, TINY_MODELS[name])
    config = EngineConfig(
        dtype="float32", device="cpu", block_size=4, max_cache_size=1 << 20, max_model_len=64
    )
    runner = Runner(config, folder)
    prompts = [prompt_ids(length, runner.model_config.vocab_size, length) for length in (1, 7, 22)]
    expected = generate(runner, make_lanes(runner, prompts, NUM_TOKENS), NUM_TOKENS)
    device = torch.device("cpu")
    with Checkpoint(folder, runner.model_config, torch.float32, device) as checkpoint:
        decoder = ReplayingDecoder(
            runner.model_config,
            checkpoint,
            device=device,
            dtype=torch.float32,
            max_model_len=64,
            max_seqs=8,
            block_size=4,
        )
    runner._decoder = decoder
    for _ in range(2):  # the second time with another cache
        lanes = make_lanes(runner, prompts, NUM_TOKENS)
        assert generate(runner, lanes, NUM_TOKENS, chunk=9) == expected
    assert decoder.num_replays >= 2 * (NUM_TOKENS - 2)


def test_without_flashinfer_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"pip install 'xllm\[cuda\]'"):
        cuda.FlashInferKernels(torch.device("cpu"))
