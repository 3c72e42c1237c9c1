"""Drives a `Runner` by hand: batches without a scheduler, for tests of the compute side alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from xllm.engine.batch import Batch
from xllm.engine.runner import Runner
from xllm.engine.sampler import Draw, SamplingBatch
from xllm.protocol import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Lane:
    """One sequence with blocks of its own."""

    token_ids: list[int]
    block_table: list[int]
    num_computed: int = 0
    num_written: int = 0
    """Tokens whose K and V are in the cache; more than `num_computed` where they are reused."""
    output_ids: list[int] = field(default_factory=list)

    @property
    def num_remaining(self) -> int:
        return len(self.token_ids) - self.num_computed


def make_lanes(runner: Runner, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Lane]:
    """Lanes whose blocks are scattered over a cache that is allocated for them."""
    sizes = [-(-(len(prompt) + max_tokens) // runner.block_size) for prompt in prompts]
    runner.allocate_cache(sum(sizes) + 1)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1)).tolist()
    lanes: list[Lane] = []
    for prompt, size in zip(prompts, sizes, strict=True):
        lanes.append(Lane(list(prompt), [order.pop() + 1 for _ in range(size)]))
    return lanes


def make_batch(
    parts: Sequence[tuple[Lane, int]], block_size: int, *, logits_rows: Sequence[int] | None = None
) -> Batch:
    """The next tokens of each lane, as many as given, and the logits of each lane's last one."""
    parts = sorted(parts, key=lambda part: part[1] != 1)
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for lane, num_tokens in parts:
        for position in range(lane.num_computed, lane.num_computed + num_tokens):
            input_ids.append(lane.token_ids[position])
            positions.append(position)
            slot = lane.block_table[position // block_size] * block_size + position % block_size
            slots.append(slot if position >= lane.num_written else -1)
        starts.append(len(input_ids))
    width = max(len(lane.block_table) for lane, _ in parts)
    tables = torch.full((len(parts), width), 2**30, dtype=torch.int32)
    context_lens = [lane.num_computed + num_tokens for lane, num_tokens in parts]
    for row, (lane, _) in enumerate(parts):
        needed = -(-context_lens[row] // block_size)
        tables[row, :needed] = torch.tensor(lane.block_table[:needed])
    if logits_rows is None:
        logits_rows = [start - 1 for start in starts[1:]]
    return Batch(
        input_ids=torch.tensor(input_ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        logits_indices=torch.tensor(list(logits_rows), dtype=torch.int64),
        num_decodes=sum(num_tokens == 1 for _, num_tokens in parts),
        max_query_len=max(num_tokens for _, num_tokens in parts),
        max_context_len=max(context_lens),
    )


def generate(
    runner: Runner, lanes: Sequence[Lane], max_tokens: int, *, chunk: int = 1 << 30
) -> list[list[int]]:
    """Greedy continuations, past EOS: all lanes in every step, at most `chunk` tokens of each."""
    while running := [lane for lane in lanes if len(lane.output_ids) < max_tokens]:
        parts = [(lane, min(chunk, lane.num_remaining)) for lane in running]
        parts.sort(key=lambda part: part[1] != 1)
        draws = [Draw(GREEDY, 0, len(lane.output_ids)) for lane, _ in parts]
        sampled = runner.execute(make_batch(parts, runner.block_size), SamplingBatch(draws))
        assert not sampled.faulty_rows
        for (lane, num_tokens), token_id in zip(parts, sampled.token_ids, strict=True):
            lane.num_computed += num_tokens
            lane.num_written = max(lane.num_written, lane.num_computed)
            if lane.num_remaining == 0:
                lane.token_ids.append(token_id)
                lane.output_ids.append(token_id)
    return [lane.output_ids for lane in lanes]


def prompt_logits(runner: Runner, token_ids: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    """[len(rows), V] float32: of the given positions of one prompt, computed in one piece."""
    (lane,) = make_lanes(runner, [token_ids], 0)
    return runner.logits(make_batch([(lane, len(token_ids))], runner.block_size, logits_rows=rows))
