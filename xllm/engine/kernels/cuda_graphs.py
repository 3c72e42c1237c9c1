"""A decoder whose decode steps are replayed CUDA graphs.

A decode step of a few rows launches hundreds of kernels that take microseconds each: the CPU would
be slower than the GPU. A graph is one launch. It is captured once per number of sequences (see
`graph_sizes`); a step runs in the next larger one, its spare rows write nothing and their results
are dropped. Steps with prompts run as they are: their kernels are long enough.

Graphs hold addresses: of the weights, of their own inputs, and of the KV cache. A cache at another
address makes them be captured again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xllm.engine.batch import Batch, HostIndices
from xllm.engine.kernels.cuda import (
    AttentionShape,
    FlashInferKernels,
    PagedAttention,
    host_indices,
)
from xllm.engine.kernels.paged_indices import graph_sizes, pad_decodes, padded_size, paged_indices
from xllm.engine.model import ComposedDecoder
from xllm.engine.model_config import DecoderConfig
from xllm.engine.weights import WeightSource

_WARM_UP_RUNS = 2
"""Before a capture: the first runs compile kernels and allocate, which a capture must not."""


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Batch
    """What the captured kernels read."""
    attention: PagedAttention
    replayed: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    """[size, E]: what they write; the next replay overwrites it."""


class CudaDecoder:
    """Implements `Decoder`."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: WeightSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        max_seqs: int,
        block_size: int,
    ) -> None:
        """Raises: ConfigError where FlashInfer is missing."""
        self._kernels = FlashInferKernels(device)
        self._decoder = ComposedDecoder(config, weights, self._kernels, max_model_len, device)
        self._device = device
        self._shape = AttentionShape(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            scale=config.head_dim**-0.5,
            dtype=dtype,
        )
        self._max_blocks_per_seq = -(-max_model_len // block_size)
        self._sizes = graph_sizes(max_seqs)
        self._graphs: dict[int, _Graph] = {}
        self._cache_address = 0

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        size = padded_size(self._sizes, batch.num_seqs) if _is_plain_decode(batch) else None
        if size is None:
            return self._decoder.forward(batch, kv_cache)
        if kv_cache.data_ptr() != self._cache_address:
            self._capture_all(kv_cache)
        return self._replay(self._graphs[size], batch, size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden)

    def _replay(self, graph: _Graph, batch: Batch, size: int) -> torch.Tensor:
        num_seqs, inputs = batch.num_seqs, graph.inputs
        self._plan(inputs, graph.attention, pad_decodes(host_indices(batch), size))
        inputs.input_ids[:num_seqs].copy_(batch.input_ids)
        inputs.positions[:num_seqs].copy_(batch.positions)
        inputs.slot_mapping[:num_seqs].copy_(batch.slot_mapping)
        # Spare rows keep any valid token and position, but must not write where earlier steps did.
        inputs.slot_mapping[num_seqs:].fill_(-1)
        graph.replayed.replay()
        return graph.hidden[:num_seqs]

    def _plan(self, inputs: Batch, attention: PagedAttention, host: HostIndices) -> None:
        indices = paged_indices(host, self._shape.block_size)
        self._kernels.plan(inputs, attention, indices, self._shape)

    def _capture_all(self, kv_cache: torch.Tensor) -> None:
        """The largest first: the others then fit into its memory."""
        self._graphs.clear()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._graphs[size] = self._capture(size, kv_cache, pool)
        self._cache_address = kv_cache.data_ptr()

    def _capture(self, size: int, kv_cache: torch.Tensor, pool: Any) -> _Graph:
        attention = self._kernels.graph_attention(size, size * self._max_blocks_per_seq)
        inputs = self._new_inputs(size)
        one_token = HostIndices(
            query_start_loc=np.arange(size + 1, dtype=np.int32),
            context_lens=np.ones(size, np.int32),
            block_tables=np.zeros((size, 1), np.int32),
        )
        self._plan(inputs, attention, one_token)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._decoder.forward(inputs, kv_cache)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            hidden = self._decoder.forward(inputs, kv_cache)
        return _Graph(inputs, attention, graph, hidden)

    def _new_inputs(self, size: int) -> Batch:
        """Rows that write nothing. Attention has its own copy of the lengths and the tables."""
        zeros = torch.zeros(size, dtype=torch.int64, device=self._device)
        rows = torch.arange(size + 1, device=self._device)
        return Batch(
            input_ids=zeros.clone(),
            positions=zeros.clone(),
            slot_mapping=torch.full_like(zeros, -1),
            query_start_loc=rows.int(),
            context_lens=torch.ones(size, dtype=torch.int32, device=self._device),
            block_tables=torch.zeros(size, 1, dtype=torch.int32, device=self._device),
            logits_indices=rows[:size],
            num_decodes=size,
            max_query_len=1,
            max_context_len=1,
        )


def _is_plain_decode(batch: Batch) -> bool:
    """One row and one row of logits per sequence."""
    return batch.num_decodes == batch.num_seqs == batch.logits_indices.shape[0]
