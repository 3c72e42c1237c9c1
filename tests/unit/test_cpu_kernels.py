"""The native CPU kernels against `reference.py` and float64, for every instruction set that this
machine can run: on shapes, strides and lengths that Hypothesis makes up, with everything that must
not be read poisoned and everything that must not be written guarded.

The whole file also runs once more under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.engine.batch import Batch
from xllm.engine.kernels.cpu import build, native
from xllm.engine.kernels.cpu.build import Isa
from xllm.engine.kernels.cpu.decoder import NativeDecoder
from xllm.engine.kernels.reference import ReferenceKernels
from xllm.engine.model import ComposedDecoder
from xllm.engine.model_config import DecoderConfig
from xllm.engine.weights import LayerWeights

SANITIZER_FLAGS = tuple(os.environ.get("XLLM_TEST_KERNEL_FLAGS", "").split())
ISAS = [pytest.param(isa, id=isa.name) for isa in build.supported_isas()]
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 1e-2)}
"""Absolute and relative: of what is rounded to the dtype once."""

_libraries: dict[str, ctypes.CDLL] = {}

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)
thread_counts = st.integers(1, 3)
examples = settings(max_examples=25, deadline=None)

pytestmark = pytest.mark.parametrize("isa", ISAS)


def library(isa: Isa) -> ctypes.CDLL:
    if isa.name not in _libraries:
        _libraries[isa.name] = native.load_library(build.build_library(isa, SANITIZER_FLAGS))
    return _libraries[isa.name]


class Guarded:
    """Rows that a kernel may write, NaN so far, in memory whose rest must stay as it is."""

    def __init__(self, rows: int, columns: int, stride: int, dtype: torch.dtype) -> None:
        margin = 64
        self._memory = torch.full((rows * stride + 2 * margin,), 7.5, dtype=dtype)
        self.rows = self._memory[margin : margin + rows * stride].view(rows, stride)[:, :columns]
        self.rows.fill_(math.nan)
        self._margin, self._stride = margin, stride

    @property
    def address(self) -> int:
        return self.rows.data_ptr()

    def check_guards(self) -> None:
        rest = self._memory.clone()
        inner = rest[self._margin : rest.numel() - self._margin].view(-1, self._stride)
        inner[:, : self.rows.shape[1]] = 7.5
        assert (rest == 7.5).all()


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def strided(tensor: torch.Tensor, extra: int) -> torch.Tensor:
    """The same rows, `extra` NaNs between them."""
    padded = torch.full((tensor.shape[0], tensor.shape[1] + extra), math.nan, dtype=tensor.dtype)
    padded[:, : tensor.shape[1]] = tensor
    return padded[:, : tensor.shape[1]]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    absolute, relative = TOLERANCES[actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=absolute * scale, rtol=relative
    )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    kind = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))


@st.composite
def linears(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.one_of(st.integers(1, 40), st.integers(100, 300))),
        "n": 2 * draw(st.integers(1, 60)),
        "k": draw(st.one_of(st.integers(1, 200), st.sampled_from([1535, 1537, 3200]))),
        "dtype": draw(dtypes),
        "has_bias": draw(st.booleans()),
        "extra": draw(st.integers(0, 9)),
        "threads": draw(thread_counts),
        "seed": draw(seeds),
    }


@given(case=linears(), gated=st.booleans())
@examples
def test_linear_matches_float64(isa: Isa, case: dict[str, Any], gated: bool) -> None:
    rows, n, k, dtype = case["rows"], case["n"], case["k"], case["dtype"]
    generator = torch.Generator().manual_seed(case["seed"])
    weight = strided(randn(generator, n, k, dtype=dtype) / k**0.5, case["extra"])
    bias = randn(generator, n, dtype=dtype) if case["has_bias"] else None
    x = strided(randn(generator, rows, k, dtype=dtype), case["extra"])
    pool = native.Pool(library(isa), case["threads"])
    linear = native.PackedLinear(pool, weight, bias, gated=gated)
    columns = n // 2 if gated else n
    out = Guarded(rows, columns, columns + case["extra"], dtype)

    pool.library.xllm_linear(
        pool.handle, byref(linear.struct), x.data_ptr(), x.stride(0), rows, out.address,
        columns + case["extra"],
    )  # fmt: skip

    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    assert_close(out.rows, expected)
    out.check_guards()


@given(case=linears())
@examples
def test_norm_and_residual_are_fused_into_linears(isa: Isa, case: dict[str, Any]) -> None:
    rows, n, k, dtype = case["rows"], case["n"], case["k"], case["dtype"]
    generator = torch.Generator().manual_seed(case["seed"])
    weight = randn(generator, n, k, dtype=dtype) / k**0.5
    residual = strided(randn(generator, rows, k, dtype=torch.float32), case["extra"])
    norm = torch.rand(k, generator=generator) + 0.5
    pool = native.Pool(library(isa), case["threads"])
    linear = native.PackedLinear(pool, weight, None)
    out = Guarded(rows, n, n + case["extra"], dtype)
    pool.library.xllm_norm_linear(
        pool.handle, byref(linear.struct), residual.data_ptr(), residual.stride(0),
        norm.data_ptr(), 1e-5, rows, out.address, n + case["extra"],
    )  # fmt: skip
    wide = residual.double()
    normed = wide / (wide.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * norm.double()
    # What is multiplied is rounded to the dtype first, as an unfused norm would leave it.
    assert_close(out.rows, normed.to(dtype).double() @ weight.double().T)
    out.check_guards()

    x = randn(generator, rows, k, dtype=dtype)
    total = Guarded(rows, n, n + case["extra"], torch.float32)
    start = randn(generator, rows, n, dtype=torch.float32)
    total.rows.copy_(start)
    pool.library.xllm_linear_add(
        pool.handle, byref(linear.struct), x.data_ptr(), k, rows, total.address, n + case["extra"]
    )
    assert_close(total.rows, start.double() + x.double() @ weight.double().T)
    total.check_guards()


@given(case=linears())
@examples
def test_a_row_alone_and_in_any_batch_has_the_same_bits(isa: Isa, case: dict[str, Any]) -> None:
    rows, n, k, dtype = case["rows"], case["n"], case["k"], case["dtype"]
    generator = torch.Generator().manual_seed(case["seed"])
    pool = native.Pool(library(isa), case["threads"])
    linear = native.PackedLinear(pool, randn(generator, n, k, dtype=dtype), None)
    x = randn(generator, rows, k, dtype=dtype)

    def run(part: torch.Tensor) -> torch.Tensor:
        out = torch.full((part.shape[0], n), math.nan, dtype=dtype)
        pool.library.xllm_linear(
            pool.handle, byref(linear.struct), part.data_ptr(), k, part.shape[0], out.data_ptr(), n
        )
        return out

    together = run(x)
    for row in {0, rows // 2, rows - 1}:
        assert_same_bits(run(x[row : row + 1].clone()), together[row : row + 1])
    assert_same_bits(run(x[rows // 3 :].clone()), together[rows // 3 :])


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_kv_heads = draw(st.integers(1, 3))
    return Shape(
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 7, 16])),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 20, 64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from([1, 5, 16, 32])),
    )


lengths_of_sequences = st.lists(
    st.tuples(st.one_of(st.integers(0, 40), st.integers(200, 800)), st.integers(1, 60)),
    min_size=1,
    max_size=4,
)
"""Of (tokens computed before, tokens of this step)."""


def make_batch(
    lengths: Sequence[tuple[int, int]],
    block_size: int,
    generator: torch.Generator,
    *,
    vocab_size: int = 1,
    written: Sequence[int] = (),
) -> tuple[Batch, int]:
    """(the batch, blocks of the cache). `written`: sequences whose slots are -1."""
    needed = [-(-(past + new) // block_size) for past, new in lengths]
    num_blocks = sum(needed) + 2
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    tables = torch.full((len(lengths), max(needed) + 1), 2**31 - 1, dtype=torch.int32)
    positions, slots, starts = [], [], [0]
    for seq, (past, new) in enumerate(lengths):
        first = sum(needed[:seq])
        tables[seq, : needed[seq]] = order[first : first + needed[seq]]
        position = torch.arange(past, past + new)
        block = tables[seq, position // block_size].long()
        slot = block * block_size + position % block_size
        positions.append(position)
        slots.append(torch.full_like(slot, -1) if seq in written else slot)
        starts.append(starts[-1] + new)
    total = starts[-1]
    batch = Batch(
        input_ids=torch.randint(vocab_size, (total,), generator=generator),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([past + new for past, new in lengths], dtype=torch.int32),
        block_tables=tables,
        logits_indices=torch.arange(total),
        num_decodes=0,
        max_query_len=max(new for _, new in lengths),
        max_context_len=max(past + new for past, new in lengths),
    )
    return batch, num_blocks


def poisoned_cache(
    batch: Batch, num_blocks: int, num_layers: int, shape: Shape, generator: torch.Generator,
    dtype: torch.dtype, *, with_new: bool,
) -> torch.Tensor:  # fmt: skip
    """[N, L, 2, S, G, D]: random where tokens are, the new ones only `with_new`; else NaN."""
    size = (num_layers, 2, shape.block_size, shape.num_kv_heads, shape.head_dim)
    cache = torch.full((num_blocks, *size), math.nan, dtype=dtype)
    for seq in range(batch.num_seqs):
        rows = slice(int(batch.query_start_loc[seq]), int(batch.query_start_loc[seq + 1]))
        new = rows.stop - rows.start
        is_written = bool((batch.slot_mapping[rows] < 0).all())
        filled = int(batch.context_lens[seq]) - (0 if with_new or is_written else new)
        position = torch.arange(filled)
        block = batch.block_tables[seq, position // shape.block_size].long()
        cache[block, :, :, position % shape.block_size] = randn(
            generator, filled, num_layers, 2, shape.num_kv_heads, shape.head_dim, dtype=dtype
        )
    return cache


def attention_struct(
    shape: Shape, dtype: torch.dtype, cos_sin: torch.Tensor | None = None
) -> native.AttentionStruct:
    return native.AttentionStruct(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        eps=1e-6,
        cos_sin=native.address(cos_sin),
        dtype=native.DTYPES[dtype],
    )


@given(
    shape=shapes(), lengths=lengths_of_sequences, dtype=dtypes, threads=thread_counts, seed=seeds
)
@examples
def test_attention_matches_reference(
    isa: Isa, shape: Shape, lengths: list[tuple[int, int]], dtype: torch.dtype, threads: int,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    batch, num_blocks = make_batch(lengths, shape.block_size, generator)
    cache = poisoned_cache(batch, num_blocks, 2, shape, generator, dtype, with_new=True)
    width, extra = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    query = strided(randn(generator, batch.num_tokens, width, dtype=dtype), extra)
    out = Guarded(batch.num_tokens, width, width + 3, dtype)
    pool = native.Pool(library(isa), threads)
    structs = attention_struct(shape, dtype), native.batch_struct(batch)
    layer = native.kv_layer_struct(cache[:, 1])

    pool.library.xllm_attention(
        pool.handle, byref(structs[0]), byref(structs[1]), query.data_ptr(), query.stride(0),
        byref(layer), out.address, width + 3,
    )  # fmt: skip

    heads = query.float().unflatten(1, (shape.num_heads, shape.head_dim))
    expected = ReferenceKernels().attention(heads, batch, cache[:, 1].float(), shape.head_dim**-0.5)
    assert_close(out.rows, expected.flatten(1))
    out.check_guards()


@given(
    shape=shapes(), lengths=lengths_of_sequences, dtype=dtypes, threads=thread_counts, seed=seeds
)
@examples
def test_rope_and_write_matches_reference(
    isa: Isa, shape: Shape, lengths: list[tuple[int, int]], dtype: torch.dtype, threads: int,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    batch, num_blocks = make_batch(lengths, shape.block_size, generator, written=[0])
    cache = poisoned_cache(batch, num_blocks, 2, shape, generator, dtype, with_new=False)
    expected_cache = cache.clone()
    num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    cos_sin = torch.randn(batch.max_context_len, head_dim, generator=generator)
    qkv = Guarded(batch.num_tokens, width, width + 5, dtype)
    qkv.rows.copy_(randn(generator, batch.num_tokens, width, dtype=dtype))
    heads = qkv.rows.clone().unflatten(1, (-1, head_dim))
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    pool = native.Pool(library(isa), threads)
    structs = attention_struct(shape, dtype, cos_sin), native.batch_struct(batch)
    layer = native.kv_layer_struct(cache[:, 1])

    pool.library.xllm_rope_and_write(
        pool.handle, byref(structs[0]), byref(structs[1]), qkv.address, width + 5, byref(layer)
    )
    ReferenceKernels().rope_and_write(query, key, value, cos_sin, batch, expected_cache[:, 1])

    assert_close(qkv.rows, heads.flatten(1))
    assert torch.equal(cache.isnan(), expected_cache.isnan())
    assert_close(cache.nan_to_num(), expected_cache.nan_to_num())
    qkv.check_guards()


CONFIGS = [
    dict(num_heads=9, num_kv_heads=3, head_dim=64),
    dict(num_heads=4, num_kv_heads=2, head_dim=20, tie_word_embeddings=False, qkv_bias=True,
         o_bias=True, mlp_bias=True),
    dict(num_heads=14, num_kv_heads=2, head_dim=80, qk_norm=True),
]  # fmt: skip


def make_config(**changes: Any) -> DecoderConfig:
    base = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=99,
        hidden_size=96,
        intermediate_size=100,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_model_len=2048,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        eos_token_ids=(),
    )
    return replace(base, **changes)


class RandomWeights:
    """A model of normal random numbers: a `WeightSource`."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, inner = config.hidden_size, config.intermediate_size
        head, query = config.head_dim, config.num_heads * config.head_dim

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return randn(generator, rows, columns, dtype=dtype) / columns**0.5

        def vector(size: int, present: bool = True) -> torch.Tensor | None:
            return randn(generator, size, dtype=dtype) / 4 + 1 if present else None

        self._embedding = randn(generator, config.vocab_size, hidden, dtype=dtype)
        self._lm_head = matrix(config.vocab_size, hidden)
        self._final_norm = vector(hidden)
        self._layers = [
            LayerWeights(
                input_norm=vector(hidden),
                qkv=matrix(config.qkv_size, hidden),
                qkv_bias=vector(config.qkv_size, config.qkv_bias),
                q_norm=vector(head, config.qk_norm),
                k_norm=vector(head, config.qk_norm),
                o=matrix(hidden, query),
                o_bias=vector(hidden, config.o_bias),
                post_attention_norm=vector(hidden),
                gate_up=matrix(2 * inner, hidden),
                gate_up_bias=vector(2 * inner, config.mlp_bias),
                down=matrix(hidden, inner),
                down_bias=vector(hidden, config.mlp_bias),
            )
            for _ in range(config.num_layers)
        ]

    def embedding(self) -> torch.Tensor:
        return self._embedding

    def lm_head(self) -> torch.Tensor:
        return self._lm_head

    def final_norm(self) -> torch.Tensor:
        return self._final_norm

    def layer(self, index: int) -> LayerWeights:
        return self._layers[index]

    def in_float32(self) -> RandomWeights:
        wide = object.__new__(RandomWeights)
        wide._embedding = self._embedding.float()
        wide._lm_head = self._lm_head.float()
        wide._final_norm = self._final_norm.float()
        wide._layers = [
            LayerWeights(
                **{
                    field.name: value if value is None else value.float()
                    for field in fields(layer)
                    for value in [getattr(layer, field.name)]
                }
            )
            for layer in self._layers
        ]
        return wide


@pytest.mark.parametrize("changes", CONFIGS, ids=["llama", "biases", "qk_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decoder_matches_composed_reference(
    isa: Isa, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    config = make_config(**changes)
    weights = RandomWeights(config, dtype)
    generator = torch.Generator().manual_seed(1)
    shape = Shape(config.num_heads, config.num_kv_heads, config.head_dim, 16)
    batch, num_blocks = make_batch(
        [(0, 1), (699, 1), (32, 1), (0, 5), (260, 40), (0, 130)], 16, generator,
        vocab_size=config.vocab_size, written=[1],
    )  # fmt: skip
    batch = replace(batch, logits_indices=torch.tensor([0, 1, 2, 7, 40, 177]))
    cache = poisoned_cache(
        batch, num_blocks, config.num_layers, shape, generator, dtype, with_new=False
    )
    reference_cache = cache.float()
    decoder = NativeDecoder(config, weights, native.Pool(library(isa), 2), 1024)
    reference = ComposedDecoder(
        config, weights.in_float32(), ReferenceKernels(), 1024, torch.device("cpu")
    )

    hidden = decoder.forward(batch, cache)
    expected = reference.forward(batch, reference_cache)

    scale = 5.0 if dtype == torch.bfloat16 else 1.0  # several roundings deep
    assert_close(hidden, expected, scale)
    assert torch.equal(cache.isnan(), reference_cache.isnan())
    assert_close(cache.nan_to_num(), reference_cache.nan_to_num(), scale)
    logits = decoder.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference.logits(hidden.float()), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_chunks_decodes_and_neighbours_do_not_change_a_bit(isa: Isa, dtype: torch.dtype) -> None:
    """A prompt in one step, in uneven chunks beside another sequence, its last token read over a
    full cache, on one thread and on three: the same hidden state and the same cache."""
    config = make_config(num_heads=6, num_kv_heads=2, head_dim=24)
    decoders = [
        NativeDecoder(config, RandomWeights(config, dtype), native.Pool(library(isa), n), 1024)
        for n in (1, 3)
    ]
    num_tokens, block_size = 300, 16
    num_blocks = -(-num_tokens // block_size)
    ids = torch.randint(99, (2, num_tokens), generator=torch.Generator().manual_seed(2))
    tables = torch.arange(2 * num_blocks, dtype=torch.int32).view(2, num_blocks)

    def run(
        decoder: NativeDecoder, cache: torch.Tensor, parts: list[tuple[int, int, int]],
        *, write: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Parts of (sequence, begin, end): the last hidden state of the first part."""
        positions = [torch.arange(begin, end) for _, begin, end in parts]
        slots = [
            tables[seq, position // block_size].long() * block_size + position % block_size
            for (seq, _, _), position in zip(parts, positions, strict=True)
        ]
        starts = torch.tensor([0, *(len(position) for position in positions)]).cumsum(0)
        slot_mapping = torch.cat(slots)
        batch = Batch(
            input_ids=torch.cat([ids[seq, begin:end] for seq, begin, end in parts]),
            positions=torch.cat(positions),
            slot_mapping=slot_mapping if write else torch.full_like(slot_mapping, -1),
            query_start_loc=starts.to(torch.int32),
            context_lens=torch.tensor([end for _, _, end in parts], dtype=torch.int32),
            block_tables=tables[[seq for seq, _, _ in parts]],
            logits_indices=starts[1:2] - 1,
            num_decodes=0,
            max_query_len=num_tokens,
            max_context_len=num_tokens,
        )
        return decoder.forward(batch, cache)

    def new_cache() -> torch.Tensor:
        return torch.full((2 * num_blocks, 2, 2, block_size, 2, 24), math.nan, dtype=dtype)

    whole = new_cache()
    expected = run(decoders[0], whole, [(0, 0, num_tokens)])
    for decoder in decoders:
        cache = new_cache()
        run(decoder, cache, [(1, 0, num_tokens)])
        last = torch.empty(0)
        for begin, end in [(0, 1), (1, 20), (20, 257), (257, 299), (299, 300)]:
            last = run(decoder, cache, [(0, begin, end), (1, begin, end)])
        assert_same_bits(last, expected)
        assert_same_bits(cache[:num_blocks], whole[:num_blocks])
        assert_same_bits(run(decoder, cache, [(0, 299, 300)], write=False), expected)


def test_a_step_without_logits_writes_the_cache(isa: Isa) -> None:
    config = make_config()
    decoder = NativeDecoder(
        config, RandomWeights(config, torch.float32), native.Pool(library(isa), 1), 64
    )
    generator = torch.Generator().manual_seed(3)
    batch, num_blocks = make_batch([(0, 20)], 16, generator, vocab_size=99)
    caches = [torch.zeros(num_blocks, 2, 2, 16, 1, 8) for _ in range(2)]
    decoder.forward(batch, caches[0])
    hidden = decoder.forward(replace(batch, logits_indices=batch.logits_indices[:0]), caches[1])
    assert hidden.shape == (0, 96)
    assert decoder.logits(hidden).shape == (0, 99)
    assert_same_bits(caches[1], caches[0])


@examples
@given(st.integers(0, 3000), st.integers(0, 64), st.integers(0, 64), seeds)
def test_a_copy_past_the_cache_copies_these_bytes_and_no_other(
    isa: Isa, num_bytes: int, to: int, start: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    source = generator.integers(0, 256, start + num_bytes, np.uint8)
    target = generator.integers(0, 256, to + num_bytes + 64, np.uint8)
    expected = target.copy()
    expected[to : to + num_bytes] = source[start:]
    native.copy_past_cache(library(isa), target[to : to + num_bytes], source[start:])
    assert np.array_equal(target, expected)


def test_threads_sleep_while_idle(isa: Isa) -> None:
    pool = native.Pool(library(isa), 3)
    data = torch.ones(1 << 20)
    assert pool.library.xllm_read(pool.handle, data.data_ptr(), data.numel()) == data.numel()
    started = time.process_time()
    threading.Event().wait(0.1)
    assert time.process_time() - started < 0.05


def test_callers_on_several_threads_take_turns(isa: Isa) -> None:
    pool = native.Pool(library(isa), 2)
    data = torch.ones(1 << 19)
    sums: list[float] = []

    def call() -> None:
        sums.extend(
            pool.library.xllm_read(pool.handle, data.data_ptr(), data.numel()) for _ in range(20)
        )

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [data.numel()] * 60


@pytest.mark.skipif(bool(SANITIZER_FLAGS), reason="this is the run under the sanitizers")
@pytest.mark.slow
def test_sanitizers_find_nothing(isa: Isa) -> None:
    if isa.name not in ("avx512bf16", "portable"):
        pytest.skip("two instruction sets cover both ways of multiplying")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "XLLM_TEST_KERNEL_FLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -O1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)),
         "-k", f"[{isa.name}"],
        env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
