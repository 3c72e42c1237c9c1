"""Block tables in the form that FlashInfer plans by, and decodes padded to the sizes of graphs.

Pure: numpy on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xllm.engine.batch import HostIndices, Int32Array


@dataclass(frozen=True, slots=True)
class PagedIndices:
    """The block tables of B sequences without their padding, one after the other (CSR)."""

    query_indptr: Int32Array
    """[B+1]: rows of sequence b are query_indptr[b] .. query_indptr[b+1]."""
    block_indptr: Int32Array
    """[B+1]: the same for `blocks`."""
    blocks: Int32Array
    """[sum of blocks]"""
    last_block_lens: Int32Array
    """[B]: tokens in the last block, 1 .. block_size."""


def paged_indices(host: HostIndices, block_size: int) -> PagedIndices:
    context_lens = host.context_lens
    num_blocks = -(-context_lens // block_size)
    is_used = np.arange(host.block_tables.shape[1]) < num_blocks[:, None]
    return PagedIndices(
        query_indptr=host.query_start_loc,
        block_indptr=np.concatenate(([0], np.cumsum(num_blocks))).astype(np.int32),
        blocks=host.block_tables[is_used],
        last_block_lens=(context_lens - (num_blocks - 1) * block_size).astype(np.int32),
    )


def graph_sizes(max_seqs: int) -> list[int]:
    """Numbers of decodes that a graph is captured for, ascending: at most `max_seqs` decodes run,
    and rows cost little below a multiple of eight."""
    sizes = [size for size in (1, 2, 4) if size < max_seqs]
    return [*sizes, *range(8, max_seqs + 8, 8)] if max_seqs > 4 else [*sizes, max_seqs]


def padded_size(sizes: Sequence[int], num_seqs: int) -> int | None:
    """The least of the ascending `sizes` that holds them; None: there is none."""
    return next((size for size in sizes if size >= num_seqs), None)


def pad_decodes(host: HostIndices, size: int) -> HostIndices:
    """B sequences of one row each, and `size` - B more that see one token: the first of sequence
    0, which is there, whatever else is."""
    num_seqs, width = host.block_tables.shape
    num_more = size - num_seqs
    tables = np.zeros((size, width), np.int32)
    tables[:num_seqs] = host.block_tables
    tables[num_seqs:, 0] = host.block_tables[0, 0]
    return HostIndices(
        query_start_loc=np.arange(size + 1, dtype=np.int32),
        context_lens=np.concatenate((host.context_lens, np.ones(num_more, np.int32))),
        block_tables=tables,
    )
