"""One step's work as tensors: what the scheduler decided, in the form the decoder reads.

Rows of all sequences are laid one after the other without padding. For sequence b of B:

    query_start_loc[b] .. query_start_loc[b+1]      its rows in input_ids, positions, slot_mapping
    context_lens[b]                                 tokens in its KV, those of this step included
    block_tables[b, :ceil(context_lens[b] / bs)]    where they are; entries after that are undefined

Sequences with one query row (decodes) come first: `num_decodes` of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from xllm.engine.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything the forward pass of one step reads. T rows, B sequences, M blocks, R logits."""

    input_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64: index of the row's token in its sequence."""
    slot_mapping: torch.Tensor
    """[T] int64: `block_id * block_size + offset` where the row's K and V go; -1: written already
    (the last token of a fully cached prompt), read them from there."""
    query_start_loc: torch.Tensor
    """[B+1] int32."""
    context_lens: torch.Tensor
    """[B] int32: the query rows included."""
    block_tables: torch.Tensor
    """[B, M] int32, rows contiguous."""
    logits_indices: torch.Tensor
    """[R] int64: rows whose logits are wanted, ascending; n times the same for n samples."""
    num_decodes: int
    max_query_len: int
    max_context_len: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """The tensors of a step that has at least one row."""
    items = plan.scheduled
    num_tokens = plan.num_tokens
    num_seqs = len(items)
    input_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slot_mapping = np.empty(num_tokens, np.int64)
    query_start_loc = np.zeros(num_seqs + 1, np.int32)
    context_lens = np.empty(num_seqs, np.int32)
    block_tables = np.zeros((num_seqs, max(len(i.seq.block_table) for i in items)), np.int32)
    logits_indices: list[int] = []
    row = 0
    for b, item in enumerate(items):
        seq, start, end = item.seq, item.start, item.start + item.num_tokens
        rows = slice(row, row + item.num_tokens)
        table = block_tables[b]
        table[: len(seq.block_table)] = seq.block_table
        input_ids[rows] = seq.token_ids[start:end]
        positions[rows] = at = np.arange(start, end)
        slots = table[at // block_size].astype(np.int64) * block_size + at % block_size
        slot_mapping[rows] = np.where(at < seq.num_written_tokens, -1, slots)
        row += item.num_tokens
        query_start_loc[b + 1] = row
        context_lens[b] = end
        logits_indices += [row - end + position for position in item.scored_positions]
        logits_indices += [row - 1] * item.num_samples
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device, non_blocking=True),
        positions=torch.from_numpy(positions).to(device, non_blocking=True),
        slot_mapping=torch.from_numpy(slot_mapping).to(device, non_blocking=True),
        query_start_loc=torch.from_numpy(query_start_loc).to(device, non_blocking=True),
        context_lens=torch.from_numpy(context_lens).to(device, non_blocking=True),
        block_tables=torch.from_numpy(block_tables).to(device, non_blocking=True),
        logits_indices=torch.tensor(logits_indices, dtype=torch.int64, device=device),
        num_decodes=plan.num_decodes,
        max_query_len=max(item.num_tokens for item in items),
        max_context_len=int(context_lens.max()),
    )
