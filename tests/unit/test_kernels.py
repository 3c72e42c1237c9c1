"""Every implementation of `Kernels` against `reference.py`, on shapes, strides and lengths that
Hypothesis makes up. Whatever a kernel has no business reading is NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.engine.batch import Batch
from xllm.engine.kernels.interface import Kernels
from xllm.engine.kernels.reference import ReferenceKernels
from xllm.engine.kernels.torch_kernels import TorchKernels

REFERENCE = ReferenceKernels()
IMPLEMENTATIONS = [pytest.param(TorchKernels, id="torch")]
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)


@dataclass(frozen=True)
class Case:
    """A step over a cache of which one layer is used, with everything unused poisoned."""

    batch: Batch
    kv_cache: torch.Tensor
    """[N, L, 2, S, G, D]"""
    query: torch.Tensor
    """[T, H, D], like key and value a part of one projection's output: rows are strided."""
    key: torch.Tensor
    value: torch.Tensor
    cos_sin: torch.Tensor

    @property
    def kv_layer(self) -> torch.Tensor:
        return self.kv_cache[:, 1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sequences that have computed a part of their tokens and now run a few more; some of the
    single rows find their K and V written already."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    num_kv_heads = draw(st.integers(1, 3))
    num_heads = num_kv_heads * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([2, 8, 16]))
    dtype = draw(dtypes)
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=5)
    )
    lengths.sort(key=lambda length: length[1] != 1)
    written = [num_new == 1 and draw(st.booleans()) for _, num_new in lengths]
    generator = torch.Generator().manual_seed(draw(seeds))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    needed = [-(-(past + new) // block_size) for past, new in lengths]
    num_blocks = sum(needed) + 2
    kv_cache = torch.full(
        (num_blocks, 2, 2, block_size, num_kv_heads, head_dim), math.nan, dtype=dtype
    )
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.full((len(lengths), max(needed) + 1), 2**31 - 1, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for seq, (past, new) in enumerate(lengths):
        blocks = [order.pop() for _ in range(needed[seq])]
        tables[seq, : len(blocks)] = torch.tensor(blocks)
        for position in range(past + new):
            block, offset = blocks[position // block_size], position % block_size
            if position < past or written[seq]:
                kv_cache[block, 1, :, offset] = randn(2, num_kv_heads, head_dim)
            if position >= past:
                positions.append(position)
                slots.append(-1 if written[seq] else block * block_size + offset)
        starts.append(len(positions))
    num_rows = len(positions)
    fused = randn(num_rows, num_heads + 2 * num_kv_heads, head_dim)
    context_lens = [past + new for past, new in lengths]
    return Case(
        batch=Batch(
            input_ids=torch.zeros(num_rows, dtype=torch.int64),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            block_tables=tables,
            logits_indices=torch.tensor([num_rows - 1]),
            num_decodes=sum(new == 1 for _, new in lengths),
            max_query_len=max(new for _, new in lengths),
            max_context_len=max(context_lens),
        ),
        kv_cache=kv_cache,
        query=fused[:, :num_heads],
        key=fused[:, num_heads : num_heads + num_kv_heads],
        value=fused[:, num_heads + num_kv_heads :],
        cos_sin=torch.rand(64, head_dim, generator=generator) * 2 - 1,
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("make_kernels", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_rope_write_and_attention(make_kernels: type[Kernels], case: Case) -> None:
    kernels = make_kernels()
    outcomes = []
    for implementation in (kernels, REFERENCE):
        cache = case.kv_cache.clone()
        query, key, value = case.query.clone(), case.key.clone(), case.value
        implementation.rope_and_write(query, key, value, case.cos_sin, case.batch, cache[:, 1])
        attended = implementation.attention(query, case.batch, cache[:, 1], 0.3)
        outcomes.append((query, key, cache, attended))
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)
    assert not outcomes[0][3].isnan().any()


@pytest.mark.parametrize("make_kernels", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_operands_that_are_views_of_one_projection(make_kernels: type[Kernels], case: Case) -> None:
    """The decoder passes slices of the fused output, rotated in place."""
    outcomes = []
    for implementation in (make_kernels(), REFERENCE):
        fused = torch.cat((case.query, case.key, case.value), dim=1)
        num_heads, num_kv_heads = case.query.shape[1], case.key.shape[1]
        query = fused[:, :num_heads]
        key = fused[:, num_heads : num_heads + num_kv_heads]
        value = fused[:, num_heads + num_kv_heads :]
        cache = case.kv_cache.clone()
        implementation.rope_and_write(query, key, value, case.cos_sin, case.batch, cache[:, 1])
        attended = implementation.attention(query, case.batch, cache[:, 1], 0.3)
        outcomes.append((fused, cache, attended))
    for actual, expected in zip(*outcomes, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("make_kernels", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), width=st.sampled_from([2, 16, 70]), dtype=dtypes, seed=seeds)
def test_row_operations(
    make_kernels: type[Kernels], rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    kernels = make_kernels()
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, residual, weight = randn(rows, width), randn(rows, width), randn(width)
    assert_close(kernels.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    heads = randn(rows, 5, width)[:, 1:3]
    assert_close(kernels.rms_norm(heads, weight, 1e-5), REFERENCE.rms_norm(heads, weight, 1e-5))
    for total in (residual, residual.float()):
        for actual, expected in zip(
            kernels.add_rms_norm(x.clone(), total.clone(), weight, 1e-5),
            REFERENCE.add_rms_norm(x.clone(), total.clone(), weight, 1e-5),
            strict=True,
        ):
            assert_close(actual, expected)
    assert_close(kernels.silu_mul(x), REFERENCE.silu_mul(x))


@pytest.mark.parametrize("make_kernels", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    inputs=st.sampled_from([1, 16, 33]),
    outputs=st.sampled_from([1, 16, 49]),
    has_bias=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_linear(
    make_kernels: type[Kernels],
    rows: int,
    inputs: int,
    outputs: int,
    has_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    linear = make_kernels().linear(weight.clone(), bias)
    assert linear.out_features == outputs
    assert_close(linear(x), REFERENCE.linear(weight, bias)(x))
