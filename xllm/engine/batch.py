"""One step's work as tensors: what the scheduler decided, in the form the decoder reads.

Rows of all sequences are laid one after the other without padding. For sequence b of B:

    query_start_loc[b] .. query_start_loc[b+1]      its rows in input_ids, positions, slot_mapping
    context_lens[b]                                 tokens in its KV, those of this step included
    block_tables[b, :ceil(context_lens[b] / bs)]    where they are; entries after that are undefined

Sequences with one query row (decodes) come first: `num_decodes` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from xllm.engine.scheduler import StepPlan

Int32Array = npt.NDArray[np.int32]


class Staging(Protocol):
    """Takes a step's arrays to the device."""

    def upload(self, arrays: Sequence[npt.NDArray[np.integer]]) -> list[torch.Tensor]:
        """Tensors of the same shapes and dtypes; valid until the next call but one."""
        ...


@dataclass(frozen=True, slots=True)
class HostIndices:
    """What attention is planned by, in host memory; the same as `Batch`'s tensors."""

    query_start_loc: Int32Array
    """[B+1]"""
    context_lens: Int32Array
    """[B]"""
    block_tables: Int32Array
    """[B, M]"""


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
    host: HostIndices | None = None
    """Where the device is not the host, so that nobody has to ask the device for them."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]


def build_batch(
    plan: StepPlan, block_size: int, device: torch.device, staging: Staging | None = None
) -> Batch:
    """The tensors of a step that has at least one row. With `staging` its arrays travel together,
    and the batch keeps a copy in host memory."""
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
    arrays = (
        input_ids,
        positions,
        slot_mapping,
        query_start_loc,
        context_lens,
        block_tables,
        np.array(logits_indices, np.int64),
    )
    tensors = staging.upload(arrays) if staging else [_to_device(a, device) for a in arrays]
    return Batch(
        input_ids=tensors[0],
        positions=tensors[1],
        slot_mapping=tensors[2],
        query_start_loc=tensors[3],
        context_lens=tensors[4],
        block_tables=tensors[5],
        logits_indices=tensors[6],
        num_decodes=plan.num_decodes,
        max_query_len=max(item.num_tokens for item in items),
        max_context_len=int(context_lens.max()),
        host=HostIndices(query_start_loc, context_lens, block_tables) if staging else None,
    )


def _to_device(array: npt.NDArray[np.integer], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
