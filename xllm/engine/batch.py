"""One step's work as tensors: what the scheduler decided, in the form the decoder reads.

Rows of all sequences are laid one after the other without padding. For sequence b of B:

    query_start_loc[b] .. query_start_loc[b+1]      its rows in input_ids, positions, slot_mapping
    context_lens[b]                                 tokens in its KV, those of this step included
    block_tables[b, :ceil(context_lens[b] / bs)]    where they are; entries after that are undefined

Sequences with one query row (decodes) come first: `num_decodes` of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    """[R] int64: rows whose logits are wanted, ascending."""
    num_decodes: int
    max_query_len: int
    max_context_len: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]
