"""The native CPU kernels against what the machine can do, measured in the same run.

    limit of a decode step    max(weight bytes / bandwidth, linear FLOP / GEMM rate)
                              + KV bytes / bandwidth
    limit of a prefill        (linear FLOP + 4 H D L T^2 / 2) / GEMM rate

Bandwidth is a vector read of 512 MiB by all threads, the GEMM rate torch's (oneDNN's) of
2048 x 576 x 3072 in bfloat16. The model has SmolLM2-135M's shape and random weights: only shapes
matter here. Rounds of all rows are repeated and each row keeps its median, or with `--minimum` its
minimum, for machines that others use at the same time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.report import Row, at_least, plain
from xllm.engine.batch import Batch
from xllm.engine.kernels.cpu.build import build_library, select_isa
from xllm.engine.kernels.cpu.decoder import NativeDecoder
from xllm.engine.kernels.cpu.native import Pool, load_library
from xllm.engine.model_config import DecoderConfig
from xllm.engine.weights import LayerWeights

SUMMARY = "CPU kernels: decode and prefill against memory bandwidth and GEMM rate"

_CONTEXT = 512
_BLOCK_SIZE = 32
_CHUNK = 2048
_READ_FLOATS = 128 << 20
_DECODE_TARGETS = {1: 0.70, 4: 0.65, 16: 0.55, 32: 0.65}
_PREFILL_TARGETS = {512: 0.75, 2048: 0.75, 4096: 0.70}
_FP32_TARGET = 0.6

SMOLLM2_135M = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    max_model_len=8192,
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minimum", action="store_true", help="the best round, not the median")


def run(options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(options.threads)
    pool = Pool(load_library(build_library(select_isa())), options.threads)
    bench = _Bench(pool, options.rounds, min if options.minimum else median)
    return bench.run()


class _RandomWeights:
    """A `WeightSource` of uniform random numbers."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype

    def embedding(self) -> torch.Tensor:
        return self._matrix(self._config.vocab_size, self._config.hidden_size)

    def lm_head(self) -> torch.Tensor:
        return self.embedding()

    def final_norm(self) -> torch.Tensor:
        return torch.ones(self._config.hidden_size, dtype=self._dtype)

    def layer(self, index: int) -> LayerWeights:
        del index
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        return LayerWeights(
            input_norm=self.final_norm(),
            qkv=self._matrix(config.qkv_size, hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            o=self._matrix(hidden, config.num_heads * config.head_dim),
            o_bias=None,
            post_attention_norm=self.final_norm(),
            gate_up=self._matrix(2 * inner, hidden),
            gate_up_bias=None,
            down=self._matrix(hidden, inner),
            down_bias=None,
        )

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        return ((torch.rand(rows, columns) - 0.5) / columns**0.5).to(self._dtype)


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    run: Callable[[], object]
    calls: int
    """Of `run` in one round; the round counts their median."""
    tokens: int
    limit_s: Callable[[float, float], float]
    """Of (bytes/s, FLOP/s)."""
    target: float


class _Bench:
    def __init__(self, pool: Pool, rounds: int, summarize: Callable[[list[float]], float]) -> None:
        self._pool = pool
        self._rounds = rounds
        self._summarize = summarize

    def run(self) -> list[Row]:
        cases = [*self._cases(torch.bfloat16), self._cases(torch.float32)[0]]
        bandwidths: list[float] = []
        gemm_rates: list[float] = []
        times: list[list[float]] = [[] for _ in cases]
        for case in cases:
            case.run()
        for _ in range(self._rounds):
            bandwidths.append(self._bandwidth())
            gemm_rates.append(self._gemm_rate())
            for case, measured in zip(cases, times, strict=True):
                measured.append(self._time(case.run, case.calls))
        bandwidth, gemm_rate = (
            -self._summarize([-b for b in bandwidths]),
            -self._summarize([-rate for rate in gemm_rates]),
        )
        rows = [
            plain("bandwidth", bandwidth / 1e9, "GB/s"),
            plain("gemm_rate", gemm_rate / 1e9, "GFLOP/s"),
        ]
        for case, measured in zip(cases, times, strict=True):
            rate = case.tokens / self._summarize(measured)
            best = case.tokens / case.limit_s(bandwidth, gemm_rate)
            rows.append(at_least(case.name, rate, "tok/s", best, case.target))
        return rows

    def _cases(self, dtype: torch.dtype) -> list[_Case]:
        config = SMOLLM2_135M
        decoder = NativeDecoder(config, _RandomWeights(config, dtype), self._pool, 8192)
        num_blocks = max(_DECODE_TARGETS) * _CONTEXT // _BLOCK_SIZE
        shape = (config.num_layers, 2, _BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        cache = torch.empty(num_blocks, *shape, dtype=dtype)
        kv_bytes = cache[0].nbytes // _BLOCK_SIZE
        weight_bytes = decoder.weight_bytes
        linear_flop = 2 * weight_bytes // dtype.itemsize
        is_float32 = dtype == torch.float32

        def decode(size: int, target: float) -> _Case:
            batch = _make_batch([(_CONTEXT - 1, 1)] * size)

            def limit_s(bandwidth: float, gemm_rate: float) -> float:
                compute = 0.0 if is_float32 else linear_flop * size / gemm_rate
                read = size * _CONTEXT * kv_bytes / bandwidth
                return max(weight_bytes / bandwidth, compute) + read

            return _Case(
                f"{'fp32_' if is_float32 else ''}decode_b{size}",
                lambda: decoder.logits(decoder.forward(batch, cache)),
                20,
                size,
                limit_s,
                _FP32_TARGET if is_float32 else target,
            )

        def prefill(length: int, target: float) -> _Case:
            batches = [
                _make_batch([(begin, min(_CHUNK, length - begin))])
                for begin in range(0, length, _CHUNK)
            ]
            body_flop = linear_flop - 2 * config.vocab_size * config.hidden_size
            per_pair = 4 * config.num_heads * config.head_dim * config.num_layers

            def limit_s(bandwidth: float, gemm_rate: float) -> float:
                del bandwidth
                return (body_flop * length + per_pair * length**2 / 2) / gemm_rate

            def step() -> None:
                for batch in batches:
                    hidden = decoder.forward(batch, cache)
                decoder.logits(hidden)

            return _Case(f"prefill_{length}", step, 1, length, limit_s, target)

        return [
            *(decode(size, target) for size, target in _DECODE_TARGETS.items()),
            *(prefill(length, target) for length, target in _PREFILL_TARGETS.items()),
        ]

    def _bandwidth(self) -> float:
        data = torch.ones(_READ_FLOATS)
        pool = self._pool
        elapsed = self._time(
            lambda: pool.library.xllm_read(pool.handle, data.data_ptr(), data.numel()), 5
        )
        return data.nbytes / elapsed

    def _gemm_rate(self) -> float:
        x, weight = torch.ones(2048, 576).bfloat16(), torch.ones(3072, 576).bfloat16()
        elapsed = self._time(lambda: torch.nn.functional.linear(x, weight), 10)
        return 2 * 2048 * 576 * 3072 / elapsed

    def _time(self, run: Callable[[], object], calls: int) -> float:
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return self._summarize(times)


def _make_batch(lengths: list[tuple[int, int]]) -> Batch:
    """Sequences of (tokens before, new tokens) in blocks of their own, scattered over the cache;
    the last row's logits of each."""
    needed = [-(-(past + new) // _BLOCK_SIZE) for past, new in lengths]
    blocks = torch.randperm(sum(needed), dtype=torch.int32)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    positions, slots = [], []
    for seq, (past, new) in enumerate(lengths):
        first = sum(needed[:seq])
        tables[seq, : needed[seq]] = blocks[first : first + needed[seq]]
        position = torch.arange(past, past + new)
        positions.append(position)
        block = tables[seq, position // _BLOCK_SIZE].long()
        slots.append(block * _BLOCK_SIZE + position % _BLOCK_SIZE)
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    return Batch(
        input_ids=torch.zeros(int(starts[-1]), dtype=torch.int64),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        query_start_loc=starts.to(torch.int32),
        context_lens=torch.tensor([past + new for past, new in lengths], dtype=torch.int32),
        block_tables=tables,
        logits_indices=starts[1:] - 1,
        num_decodes=sum(new == 1 for _, new in lengths),
        max_query_len=max(new for _, new in lengths),
        max_context_len=max(past + new for past, new in lengths),
    )
