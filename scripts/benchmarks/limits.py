"""What the machine allows: its rates, measured, and what a step of the model costs at those rates.

    decode limit    max(weight bytes / bandwidth, linear FLOP / GEMM rate) + KV bytes / bandwidth
    prefill limit   (FLOP of the layers' matrices * T + causal attention over T) / GEMM rate

A probe is asked again before each measurement, so that a value and its limit come from the same
moment of a machine that drifts; then medians are taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from xllm.engine.model_config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Rates:
    bytes_per_s: float
    flop_per_s: float


class Probe(Protocol):
    def measure(self) -> Rates: ...


class CpuProbe:
    """Bandwidth: a vector read of 512 MiB by torch's threads (as quick as one in C). GEMM rate:
    2048 x 576 x 3072 by oneDNN with prepacked weights."""

    _BYTES = 512 << 20
    _M, _K, _N = 2048, 576, 3072
    _REPEATS = 3

    def __init__(self, dtype: torch.dtype, num_threads: int) -> None:
        self._num_threads = num_threads
        self._data = torch.ones(self._BYTES // 4, dtype=torch.float32)
        self._x = torch.randn(self._M, self._K).to(dtype)
        weight = torch.randn(self._N, self._K).to(dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, self._M)

    def measure(self) -> Rates:
        # Beside the native decoder torch has one thread: the limit is that of all of them.
        before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        read_s = median(timed(self._data.sum) for _ in range(self._REPEATS))
        gemm_s = median(timed(self._multiply) for _ in range(self._REPEATS))
        torch.set_num_threads(before)
        return Rates(self._BYTES / read_s, 2 * self._M * self._K * self._N / gemm_s)

    def _multiply(self) -> None:
        torch.ops.mkldnn._linear_pointwise(self._x, self._weight, None, "none", [], "")


class CudaProbe:
    """Bandwidth: a read of 4 GiB. GEMM rate: 8192 x 4096 x 14336 in bfloat16 by cuBLAS."""

    _BYTES = 4 << 30
    _M, _K, _N = 8192, 4096, 14336
    _REPEATS = 5

    def __init__(self, device: torch.device) -> None:
        self._data = torch.ones(self._BYTES // 4, dtype=torch.float32, device=device)
        self._x = torch.randn(self._M, self._K, device=device, dtype=torch.bfloat16)
        self._weight = torch.randn(self._K, self._N, device=device, dtype=torch.bfloat16)

    def measure(self) -> Rates:
        read_s = self._device_seconds(self._data.sum)
        gemm_s = self._device_seconds(lambda: torch.mm(self._x, self._weight))
        return Rates(self._BYTES / read_s, 2 * self._M * self._K * self._N / gemm_s)

    def _device_seconds(self, action: Callable[[], object]) -> float:
        action()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._REPEATS):
            action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._REPEATS


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What the steps of one model read and compute."""

    body_parameters: int
    """Of the layers' matrices."""
    head_parameters: int
    """Of the LM head."""
    attention_flop: int
    """Per row and token that it attends to: 4 H D L."""
    kv_bytes_per_token: int
    itemsize: int

    @classmethod
    def of(cls, model: DecoderConfig, dtype: torch.dtype) -> ModelWork:
        hidden, query_size = model.hidden_size, model.num_heads * model.head_dim
        per_layer = hidden * (model.qkv_size + query_size + 3 * model.intermediate_size)
        kv_size = model.num_kv_heads * model.head_dim
        return cls(
            body_parameters=model.num_layers * per_layer,
            head_parameters=model.vocab_size * hidden,
            attention_flop=4 * query_size * model.num_layers,
            kv_bytes_per_token=2 * model.num_layers * kv_size * dtype.itemsize,
            itemsize=dtype.itemsize,
        )

    def decode_s(self, rates: Rates, num_seqs: int, context_len: int) -> float:
        parameters = self.body_parameters + self.head_parameters
        read_s = parameters * self.itemsize / rates.bytes_per_s
        compute_s = 2 * parameters * num_seqs / rates.flop_per_s
        kv_bytes = self.kv_bytes_per_token * num_seqs * context_len
        return max(read_s, compute_s) + kv_bytes / rates.bytes_per_s

    def prefill_s(self, rates: Rates, num_tokens: int) -> float:
        linear_flop = 2 * self.body_parameters * num_tokens
        return (linear_flop + self.attention_flop * num_tokens**2 / 2) / rates.flop_per_s


@dataclass(frozen=True, slots=True)
class Turns:
    """Medians of one measurement and of the machine's rates beside it."""

    seconds: float
    rates: Rates


def in_turns(
    probe: Probe, actions: Mapping[str, Callable[[], float]], num_rounds: int, repeats: int = 3
) -> dict[str, Turns]:
    """Each action returns the seconds that it took; its first call is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    rates: dict[str, list[Rates]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(num_rounds):
        for name, action in actions.items():
            rates[name].append(probe.measure())
            seconds[name] += [action() for _ in range(repeats)]
    return {name: Turns(median(seconds[name]), _median_rates(rates[name])) for name in actions}


def _median_rates(rates: Sequence[Rates]) -> Rates:
    return Rates(
        median(rate.bytes_per_s for rate in rates), median(rate.flop_per_s for rate in rates)
    )


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
