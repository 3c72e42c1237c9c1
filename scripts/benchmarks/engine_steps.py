"""Steps of the engine, run one at a time on a `Runner`: timed whole, from plan to tokens.

They run on a thread of their own, as the engine's do. It matters: torch's OpenMP threads spin after
each operation as long as one thread alone uses them, and take a core from the native kernels.

The KV of a decode's context is random; what it says does not matter to how long it takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from xllm.engine import runner as runner_module
from xllm.engine.batch import build_batch
from xllm.engine.outputs import StepOutputs
from xllm.engine.request import Sequence, SequenceState
from xllm.engine.runner import Runner
from xllm.engine.scheduler import ScheduledSequence, StepPlan
from xllm.protocol import GenerateRequest, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=1)


class StepBench:
    """Runs steps over the first blocks of a runner's cache, which it allocates."""

    def __init__(self, runner: Runner, num_tokens: int) -> None:
        """num_tokens: the most that a step's sequences hold together."""
        self._runner = runner
        self._random = random.Random(0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="steps")
        runner.allocate_cache(-(-num_tokens // runner.block_size))
        with torch.inference_mode():
            runner.cache.normal_()

    def decode(
        self, num_seqs: int, context_len: int, sampling: SamplingParams = GREEDY
    ) -> Callable[[], float]:
        """A step of `num_seqs` sequences with `context_len` tokens each: -> its seconds."""
        items = []
        for index in range(num_seqs):
            seq = self._sequence(context_len, sampling)
            per_seq = -(-context_len // self._runner.block_size)
            seq.block_table = list(range(index * per_seq, (index + 1) * per_seq))
            items.append(ScheduledSequence(seq, context_len - 1, 1, 1))
        plan = StepPlan(items, num_seqs, [])
        return lambda: self._on_thread([plan])

    def prefill(self, num_tokens: int, chunk_tokens: int) -> Callable[[], float]:
        """A prompt in chunks, and its first token: -> the seconds of all its steps."""
        seq = self._sequence(num_tokens + 1, GREEDY)
        seq.block_table = list(range(-(-num_tokens // self._runner.block_size)))
        plans = []
        for start in range(0, num_tokens, chunk_tokens):
            num_rows = min(chunk_tokens, num_tokens - start)
            is_last = start + num_rows == num_tokens
            plans.append(StepPlan([ScheduledSequence(seq, start, num_rows, int(is_last))], 0, []))
        return lambda: self._on_thread(plans)

    def sampling_seconds(self, step: Callable[[], float]) -> Callable[[], float]:
        """The part of `step` that is spent in the sampler."""

        def run() -> float:
            seconds = 0.0

            def sample(*arguments: object) -> object:
                nonlocal seconds
                started = time.perf_counter()
                sampled = original(*arguments)
                seconds += time.perf_counter() - started
                return sampled

            original = runner_module.sample
            with mock.patch.object(runner_module, "sample", sample):
                step()
            return seconds

        return run

    def _on_thread(self, plans: list[StepPlan]) -> float:
        return self._thread.submit(lambda: sum(map(self._step, plans))).result()

    def _step(self, plan: StepPlan) -> float:
        runner = self._runner
        started = time.perf_counter()
        outputs = StepOutputs(plan, (), runner.model_config.vocab_size)
        batch = build_batch(plan, runner.block_size, runner.device, runner.staging)
        sampled = runner.execute(batch, outputs.begin_sampling())
        seconds = time.perf_counter() - started
        assert not sampled.faulty_rows
        return seconds

    def _sequence(self, num_tokens: int, sampling: SamplingParams) -> Sequence:
        """Its last token is output."""
        token_ids = random_tokens(self._random, num_tokens, self._runner.model_config.vocab_size)
        request = GenerateRequest(
            request_id="bench",
            model_id="",
            prompt_ids=token_ids[:-1],
            output_ids=token_ids[-1:],
            sampling=sampling,
        )
        seq = Sequence(request, 0, 0.0)
        seq.state = SequenceState.RUNNING
        return seq


def random_tokens(source: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    return [source.randrange(vocab_size) for _ in range(num_tokens)]
