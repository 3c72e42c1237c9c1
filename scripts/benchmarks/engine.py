"""The engine against the limits of the machine: steps of one runner, and streams of one engine.

On a CPU with the default model; with --device=cuda with random weights of an 8-billion-parameter
Llama 3 (see engine_cuda.py). The limits are defined in limits.py and measured in turns with the
steps. Prompts run in chunks of the engine's default step budget.
"""

from __future__ import annotations

import argparse
import gc
import sys

import torch
import uvloop

from benchmarks import engine_cuda
from benchmarks.engine_steps import SAMPLED, StepBench
from benchmarks.engine_streams import measure_streams
from benchmarks.limits import CpuProbe, ModelWork, in_turns
from benchmarks.report import Row, at_least, at_most, limited, plain
from xllm.config import EngineConfig
from xllm.engine.runner import Runner
from xllm.model_store import resolve_model

SUMMARY = "the engine against the machine's bandwidth and GEMM rate"

CONTEXT_LEN = 512
DECODE_TARGETS = {1: 0.70, 4: 0.65, 16: 0.55, 32: 0.65}
PREFILL_TARGETS = {512: 0.75, 2048: 0.75, 4096: 0.70}
FP32_TARGET = 0.6
STREAM_ROWS = ("hit_4096", "tbt_mixed", "tbt_long")
MAX_TBT_MS = 100.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or Hub id; the default model if not given")
    parser.add_argument("--num_threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of value and limit")
    parser.add_argument(
        "--rows",
        help="comma-separated row names or their first words, such as decode,tbt_long; all",
    )


def run(options: argparse.Namespace) -> list[Row]:
    if options.device == "cuda":
        return engine_cuda.run(options.rounds)
    return _CpuBench(options).run()


class _CpuBench:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._wanted = tuple(options.rows.split(",")) if options.rows else ("",)
        self._model_path = resolve_model(
            options.model, progress=lambda line: print(line, file=sys.stderr)
        )

    def run(self) -> list[Row]:
        torch.set_num_threads(self._options.num_threads)
        rows = self._step_rows("bfloat16")
        if self._wants("fp32_decode_b1"):
            rows += self._fp32_rows()
        return rows

    def _wants(self, name: str) -> bool:
        return any(not w or name == w or name.startswith(f"{w}_") for w in self._wanted)

    def _runner(self, dtype: str) -> Runner:
        config = EngineConfig(
            device="cpu",
            dtype=dtype,
            num_threads=self._options.num_threads,
            max_cache_size=1 << 30,
        )
        return Runner(config, self._model_path)

    def _step_rows(self, dtype: str) -> list[Row]:
        decodes = [b for b in DECODE_TARGETS if self._wants(f"decode_b{b}")]
        prefills = [t for t in PREFILL_TARGETS if self._wants(f"prefill_{t}")]
        has_sampling = self._wants("sampling_b32")
        streams = frozenset(filter(self._wants, STREAM_ROWS))
        if not (decodes or prefills or has_sampling or streams):
            return []
        runner = self._runner(dtype)
        rows: list[Row] = []
        if decodes or prefills or has_sampling:
            bench = StepBench(runner, max(DECODE_TARGETS) * CONTEXT_LEN)
            rows += self._limit_rows(runner, bench, decodes, prefills)
            if has_sampling:
                rows.append(self._sampling_row(runner, bench))
        if streams:
            gc.collect()
            rows += self._stream_rows(runner, streams)
        return rows

    def _limit_rows(
        self, runner: Runner, bench: StepBench, decodes: list[int], prefills: list[int]
    ) -> list[Row]:
        probe = CpuProbe(runner.dtype, self._options.num_threads)
        work = ModelWork.of(runner.model_config, runner.dtype)
        chunk_tokens = runner.config.max_tokens_per_batch
        rounds = self._options.rounds
        rows: list[Row] = []
        actions = {f"decode_b{b}": bench.decode(b, CONTEXT_LEN) for b in decodes}
        turns = in_turns(probe, actions, rounds)
        for num_seqs in decodes:
            name = f"decode_b{num_seqs}"
            limit_s = work.decode_s(turns[name].rates, num_seqs, CONTEXT_LEN)
            rows.append(
                _rate_row(name, num_seqs, turns[name].seconds, limit_s, DECODE_TARGETS[num_seqs])
            )
        actions = {f"prefill_{t}": bench.prefill(t, chunk_tokens) for t in prefills}
        turns |= in_turns(probe, actions, rounds, repeats=1)
        for num_tokens in prefills:
            name = f"prefill_{num_tokens}"
            limit_s = work.prefill_s(turns[name].rates, num_tokens)
            target = PREFILL_TARGETS[num_tokens]
            rows.append(_rate_row(name, num_tokens, turns[name].seconds, limit_s, target))
        if turns:
            rates = next(iter(turns.values())).rates
            rows.insert(0, plain("bandwidth", rates.bytes_per_s / 1e9, "GB/s"))
            rows.insert(1, plain("gemm_rate", rates.flop_per_s / 1e9, "GFLOP/s"))
        return rows

    def _sampling_row(self, runner: Runner, bench: StepBench) -> Row:
        step = bench.decode(32, CONTEXT_LEN, SAMPLED)
        actions = {"step": step, "sampling": bench.sampling_seconds(step)}
        turns = in_turns(
            CpuProbe(runner.dtype, self._options.num_threads), actions, self._options.rounds
        )
        sampling_ms, step_ms = (turns[name].seconds * 1e3 for name in ("sampling", "step"))
        return at_most("sampling_b32", sampling_ms, "ms", step_ms, 0.10)

    def _stream_rows(self, runner: Runner, names: frozenset[str]) -> list[Row]:
        figures = uvloop.run(measure_streams(runner, names))
        rows: list[Row] = []
        if "hit_4096" in names:
            step_ms = figures.decode_step_s * 1e3
            rows.append(at_most("hit_4096", figures.hit_s * 1e3, "ms", step_ms, 3.0))
        if "tbt_mixed" in names:
            rows.append(limited("tbt_mixed", figures.mixed_p99_s * 1e3, "ms", MAX_TBT_MS))
            rows.append(
                at_least(
                    "tbt_mixed_prefill",
                    figures.mixed_tokens_per_s,
                    "tokens/s",
                    figures.alone_tokens_per_s,
                    0.6,
                )
            )
        if "tbt_long" in names:
            rows.append(limited("tbt_long", figures.long_p99_s * 1e3, "ms", MAX_TBT_MS))
        return rows

    def _fp32_rows(self) -> list[Row]:
        gc.collect()  # the other model goes first
        runner = self._runner("float32")
        bench = StepBench(runner, CONTEXT_LEN)
        actions = {"decode": bench.decode(1, CONTEXT_LEN)}
        turns = in_turns(
            CpuProbe(torch.float32, self._options.num_threads), actions, self._options.rounds
        )["decode"]
        work = ModelWork.of(runner.model_config, torch.float32)
        limit_s = work.decode_s(turns.rates, 1, CONTEXT_LEN)
        return [_rate_row("fp32_decode_b1", 1, turns.seconds, limit_s, FP32_TARGET)]


def _rate_row(name: str, num_tokens: int, seconds: float, limit_s: float, target: float) -> Row:
    return at_least(name, num_tokens / seconds, "tokens/s", num_tokens / limit_s, target)
