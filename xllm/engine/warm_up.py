"""Steps that an engine runs before it serves: the first request finds memory, threads and code
warm, and routing finds measured rates."""

from __future__ import annotations

from collections.abc import Iterator

from xllm.engine.request import Sequence
from xllm.engine.scheduler import ScheduledSequence, SchedulerLimits, StepPlan
from xllm.protocol import GenerateRequest, SamplingParams

WARM_UP_TOKENS = 512


def warm_up_plans(limits: SchedulerLimits, num_blocks: int, block_size: int) -> Iterator[StepPlan]:
    """A short and a longer prompt, and a decode after each, in blocks that nobody has yet."""
    num_tokens = min(
        limits.max_tokens_per_batch,
        limits.max_model_len - 1,
        num_blocks * block_size - 1,
        WARM_UP_TOKENS,
    )
    few = min(num_tokens, WARM_UP_TOKENS // 8)
    for start, num_rows in ((0, few), (few, 1), (0, num_tokens), (num_tokens, 1)):
        seq = Sequence(_request(start), 0, 0.0)
        seq.token_ids.extend([0] * num_rows)
        seq.num_computed_tokens = start
        seq.block_table = list(range(num_tokens // block_size + 1))
        item = ScheduledSequence(seq, start, num_rows, 1)
        yield StepPlan([item], int(num_rows == 1), [])


def _request(num_prompt_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id="warm-up",
        model_id="",
        prompt_ids=[0] * num_prompt_tokens,
        sampling=SamplingParams(temperature=0.0, max_tokens=2),
    )
