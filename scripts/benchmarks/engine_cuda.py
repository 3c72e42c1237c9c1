"""The engine on a GPU: steps of an 8-billion-parameter Llama 3 with random weights, without a
checkpoint file, against the card's own bandwidth and GEMM rate."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from benchmarks.engine_steps import StepBench
from benchmarks.limits import CudaProbe, ModelWork, Probe, in_turns
from benchmarks.report import Row, at_least, plain
from xllm.config import EngineConfig
from xllm.engine.model_config import DecoderConfig
from xllm.engine.runner import Runner
from xllm.engine.weights import LayerWeights, WeightSource

CONTEXT_LEN = 512
DECODE_SIZES = (1, 4, 16, 32, 64)
PREFILL_SIZES = (512, 2048, 4096)
DECODE_TARGET = 0.7
PREFILL_TARGET = 0.6

LLAMA_3_8B = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_model_len=8192,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(128001,),
)


def run(num_rounds: int) -> list[Row]:
    if not torch.cuda.is_available():
        print("engine: torch finds no GPU here, so there is nothing to measure", file=sys.stderr)
        return []
    runner = RandomRunner(EngineConfig(device="cuda", dtype="bfloat16"), LLAMA_3_8B)
    return measure(runner, CudaProbe(runner.device), num_rounds)


def measure(runner: Runner, probe: Probe, num_rounds: int) -> list[Row]:
    bench = StepBench(runner, max(DECODE_SIZES) * CONTEXT_LEN)
    work = ModelWork.of(runner.model_config, runner.dtype)
    chunk_tokens = runner.config.max_tokens_per_batch
    actions = {f"decode_b{b}": bench.decode(b, CONTEXT_LEN) for b in DECODE_SIZES}
    actions |= {f"prefill_{t}": bench.prefill(t, chunk_tokens) for t in PREFILL_SIZES}
    turns = in_turns(probe, actions, num_rounds)
    rates = turns["decode_b1"].rates
    rows = [
        plain("bandwidth", rates.bytes_per_s / 1e9, "GB/s"),
        plain("gemm_rate", rates.flop_per_s / 1e9, "GFLOP/s"),
    ]
    for size in DECODE_SIZES:
        turn = turns[f"decode_b{size}"]
        limit_s = work.decode_s(turn.rates, size, CONTEXT_LEN)
        rows.append(_rate_row(f"decode_b{size}", size, turn.seconds, limit_s, DECODE_TARGET))
    for size in PREFILL_SIZES:
        turn = turns[f"prefill_{size}"]
        limit_s = work.prefill_s(turn.rates, size)
        rows.append(_rate_row(f"prefill_{size}", size, turn.seconds, limit_s, PREFILL_TARGET))
    return rows


def _rate_row(name: str, num_tokens: int, seconds: float, limit_s: float, target: float) -> Row:
    return at_least(name, num_tokens / seconds, "tokens/s", num_tokens / limit_s, target)


class RandomRunner(Runner):
    """A runner of a given shape, without a model folder."""

    def __init__(self, config: EngineConfig, model: DecoderConfig) -> None:
        self._model = model
        super().__init__(config, Path())

    def _read_model(self, model_path: Path) -> tuple[DecoderConfig, str]:
        return self._model, "0" * 32

    def _open_weights(self, model_path: Path) -> AbstractContextManager[WeightSource]:
        return contextlib.nullcontext(RandomWeights(self._model, self.dtype, self.device))


class RandomWeights:
    """Implements `WeightSource`: matrices that keep activations at about unit size."""

    def __init__(self, model: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self._dtype = dtype
        self._device = device

    def embedding(self) -> torch.Tensor:
        return self._matrix(self._model.vocab_size, self._model.hidden_size)

    def lm_head(self) -> torch.Tensor:
        return self._matrix(self._model.vocab_size, self._model.hidden_size)

    def final_norm(self) -> torch.Tensor:
        return self._ones(self._model.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        model = self._model
        hidden, inner = model.hidden_size, model.intermediate_size
        return LayerWeights(
            input_norm=self._ones(hidden),
            qkv=self._matrix(model.qkv_size, hidden),
            qkv_bias=None,
            q_norm=self._ones(model.head_dim) if model.qk_norm else None,
            k_norm=self._ones(model.head_dim) if model.qk_norm else None,
            o=self._matrix(hidden, model.num_heads * model.head_dim),
            o_bias=None,
            post_attention_norm=self._ones(hidden),
            gate_up=self._matrix(2 * inner, hidden),
            gate_up_bias=None,
            down=self._matrix(hidden, inner),
            down_bias=None,
        )

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        matrix = torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        return matrix.normal_(std=columns**-0.5)

    def _ones(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=self._dtype, device=self._device)
