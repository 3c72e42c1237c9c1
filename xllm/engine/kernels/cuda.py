"""Kernels for NVIDIA GPUs: attention, RoPE and activation of FlashInfer, matrices by cuBLAS, and
two of our own in Triton.

FlashInfer reads the page-first cache in place: its kernels take K and V [N, S, G, D] with any
stride between blocks, as long as both have the same. Attention is planned once per step, on the
host, and then run by every layer. float16 and bfloat16 only; the residual is float32.

Unproven: written from FlashInfer's source (0.5.3 and 0.7.2) and not yet run on a GPU. The tests
marked `cuda` are what has to pass first.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from xllm.engine.batch import Batch, HostIndices
from xllm.engine.kernels.paged_indices import PagedIndices, paged_indices
from xllm.engine.kernels.torch_kernels import TorchLinear
from xllm.errors import ConfigError

WORKSPACE_BYTES = 256 << 20
"""For the partial results of contexts that are split; shared, as one step runs at a time."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a plan is made for, beside the lengths."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    dtype: torch.dtype


class FlashInferKernels:
    """Implements `Kernels`. `add_rms_norm` works in place."""

    def __init__(self, device: torch.device) -> None:
        self._flashinfer = import_flashinfer()
        self._triton = import_triton_kernels()
        self._device = device
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._eager = PagedAttention(self._new_wrapper())
        self._planned: tuple[Batch, PagedAttention] | None = None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> TorchLinear:
        return TorchLinear(weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed: torch.Tensor = self._flashinfer.norm.rmsnorm(x, weight, eps)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._triton.add_rms_norm_(x, residual, weight, eps)
        return x, residual

    def rope_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
    ) -> None:
        num_rows, _, head_dim = query.shape
        self._flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(
            batch.positions,
            query.view(num_rows, -1),
            key.view(num_rows, -1),
            head_dim,
            cos_sin,
            is_neox=True,
        )
        self._triton.write_kv(key, value, batch.slot_mapping, kv_layer)

    def attention(
        self, query: torch.Tensor, batch: Batch, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self._planned is None or self._planned[0] is not batch:
            _, num_heads, head_dim = query.shape
            block_size, num_kv_heads = kv_layer.shape[2:4]
            shape = AttentionShape(
                num_heads, num_kv_heads, head_dim, block_size, scale, query.dtype
            )
            self.plan(batch, self._eager, paged_indices(host_indices(batch), block_size), shape)
        assert self._planned is not None
        return self._planned[1].run(query, kv_layer)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._flashinfer.activation.silu_and_mul(gate_up)
        return product

    def plan(
        self,
        batch: Batch,
        attention: PagedAttention,
        indices: PagedIndices,
        shape: AttentionShape,
    ) -> None:
        """From here on, attention over `batch` (this very object) runs as planned."""
        attention.plan(indices, shape)
        self._planned = (batch, attention)

    def graph_attention(self, num_seqs: int, max_blocks: int) -> PagedAttention:
        """Attention whose launches may be captured: for exactly `num_seqs` decodes, whose block
        tables have at most `max_blocks` entries together."""
        sizes = (num_seqs + 1, num_seqs + 1, max_blocks, num_seqs)
        query_indptr, block_indptr, blocks, last_block_lens = (
            torch.zeros(size, dtype=torch.int32, device=self._device) for size in sizes
        )
        wrapper = self._new_wrapper(
            use_cuda_graph=True,
            qo_indptr_buf=query_indptr,
            paged_kv_indptr_buf=block_indptr,
            paged_kv_indices_buf=blocks,
            paged_kv_last_page_len_buf=last_block_lens,
        )
        return PagedAttention(wrapper)

    def _new_wrapper(self, **graph_buffers: Any) -> Any:
        # "fa2" runs on every card from sm80 on and takes any block size. Its kernel for prefills
        # packs the heads that share a KV head into one tile, which is what decodes want, too.
        return self._flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, kv_layout="NHD", backend="fa2", **graph_buffers
        )


class PagedAttention:
    """One of FlashInfer's wrappers: a plan, and the memory that it lives in."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def plan(self, indices: PagedIndices, shape: AttentionShape) -> None:
        self._wrapper.plan(
            torch.from_numpy(indices.query_indptr),
            torch.from_numpy(indices.block_indptr),
            torch.from_numpy(indices.blocks),
            torch.from_numpy(indices.last_block_lens),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_size,
            causal=True,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )

    def run(self, query: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [T, H, D]"""
        output: torch.Tensor = self._wrapper.run(query, (kv_layer[:, 0], kv_layer[:, 1]))
        return output


def host_indices(batch: Batch) -> HostIndices:
    """Waits for the device where the batch was not staged."""
    if batch.host is not None:
        return batch.host
    return HostIndices(
        batch.query_start_loc.cpu().numpy(),
        batch.context_lens.cpu().numpy(),
        batch.block_tables.cpu().numpy(),
    )


def import_flashinfer() -> ModuleType:
    """Raises: ConfigError, saying what to install."""
    try:
        import flashinfer
        import flashinfer.activation
        import flashinfer.norm
        import flashinfer.prefill
        import flashinfer.rope
    except ImportError as error:
        raise ConfigError(
            f"--device=cuda needs FlashInfer, which cannot be imported ({error}); "
            "pip install 'xllm[cuda]', or use --dtype=float32, which is slow, or --device=cpu"
        ) from error
    module: ModuleType = flashinfer
    return module


def import_triton_kernels() -> ModuleType:
    try:
        from xllm.engine.kernels import cuda_triton
    except ImportError as error:
        raise ConfigError(
            f"--device=cuda needs Triton, which cannot be imported ({error}); "
            "install torch's build for CUDA, which brings it along"
        ) from error
    return cuda_triton
