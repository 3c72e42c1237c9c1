"""What FlashInfer is told of a step, and the padding of decodes to the size of a graph."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xllm.engine.batch import HostIndices
from xllm.engine.kernels.paged_indices import graph_sizes, pad_decodes, padded_size, paged_indices

BLOCK_SIZE = 4
UNUSED = 2**31 - 1


@st.composite
def hosts(draw: st.DrawFn, max_rows: int = 9) -> HostIndices:
    context_lens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    rows = [draw(st.integers(1, min(max_rows, length))) for length in context_lens]
    needed = [-(-length // BLOCK_SIZE) for length in context_lens]
    tables = np.full((len(context_lens), max(needed) + 1), UNUSED, np.int32)
    for seq, count in enumerate(needed):
        tables[seq, :count] = [draw(st.integers(0, 99)) for _ in range(count)]
    starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
    return HostIndices(starts, np.array(context_lens, np.int32), tables)


@given(host=hosts())
def test_every_token_is_where_its_block_table_says(host: HostIndices) -> None:
    indices = paged_indices(host, BLOCK_SIZE)
    assert indices.query_indptr is host.query_start_loc
    for seq, length in enumerate(host.context_lens):
        start, end = indices.block_indptr[seq : seq + 2]
        assert indices.blocks[start:end].tolist() == host.block_tables[seq, : end - start].tolist()
        assert (end - start - 1) * BLOCK_SIZE + indices.last_block_lens[seq] == length
        assert 1 <= indices.last_block_lens[seq] <= BLOCK_SIZE
    assert indices.block_indptr[-1] == len(indices.blocks)
    assert UNUSED not in indices.blocks
    for array in (indices.block_indptr, indices.blocks, indices.last_block_lens):
        assert array.dtype == np.int32


@given(host=hosts(max_rows=1), num_more=st.integers(0, 5))
def test_padding_keeps_the_decodes_and_adds_harmless_ones(host: HostIndices, num_more: int) -> None:
    num_seqs = len(host.context_lens)
    size = num_seqs + num_more
    padded = pad_decodes(host, size)
    assert padded.query_start_loc.tolist() == list(range(size + 1))
    assert padded.context_lens.tolist() == [*host.context_lens, *[1] * num_more]
    indices = paged_indices(padded, BLOCK_SIZE)
    spare = indices.blocks[indices.block_indptr[num_seqs] :]
    assert spare.tolist() == [host.block_tables[0, 0]] * num_more
    alone = paged_indices(host, BLOCK_SIZE)
    assert indices.blocks[: len(alone.blocks)].tolist() == alone.blocks.tolist()


@given(max_seqs=st.integers(1, 300))
def test_a_graph_fits_any_number_of_decodes(max_seqs: int) -> None:
    sizes = graph_sizes(max_seqs)
    assert sizes == sorted(set(sizes))
    for num_seqs in range(1, max_seqs + 1):
        size = padded_size(sizes, num_seqs)
        assert size is not None
        assert num_seqs <= size < num_seqs + 8
    assert padded_size(sizes, sizes[-1] + 1) is None
