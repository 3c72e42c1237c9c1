"""The operations that a decoder is made of, and what each must do exactly.

`reference.py` implements them as plainly as possible, and every other implementation is tested
against it. Letters: T rows, B sequences, H query heads, G KV heads, D head size, E hidden size,
I intermediate size, V vocabulary, R rows with logits, L layers, N blocks in the cache, S tokens per
block.

There are two seams. `Kernels` replaces single operations, which `engine/model.py` composes.
`Decoder` replaces the whole stack, for an implementation that runs all layers in one native call.

The cache of all layers is one tensor [N, L, 2, S, G, D] (page-first: a block is one contiguous
extent); a kernel gets one layer of it, `kv_layer` = cache[:, l], a view [N, 2, S, G, D] whose first
stride is a whole block. 0 is K, 1 is V.
"""

from __future__ import annotations

from typing import Protocol

import torch

from xllm.engine.batch import Batch


class Linear(Protocol):
    """y = x W^T + b with weights in whatever layout the implementation likes best."""

    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        ...


class Kernels(Protocol):
    """One implementation for one kind of device. Stateless, but for scratch memory."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Takes `weight` [out, in] over: the caller drops its reference, so that packing replaces
        the original."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in float32; the result in x's dtype. Also QK norm [T, H, D]."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual) in x's dtype, x + residual in the residual's, which is the same
        or float32: a sum over all layers that is rounded only once). Both may be written over the
        arguments."""
        ...

    def rope_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
        kv_layer: torch.Tensor,
    ) -> None:
        """Rotates query [T, H, D] in place, key [T, G, D] too, and writes key and value [T, G, D]
        into their token slots, except where the slot is -1.

        cos_sin: [max_position, D] float32, cos in the first half and sin in the second, indexed by
        position; the halves of a head are rotated against each other (Llama's and Qwen's layout).
        """
        ...

    def attention(
        self, query: torch.Tensor, batch: Batch, kv_layer: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Causal attention of query [T, H, D] over the blocks of its sequence: -> [T, H, D].

        Row i of a sequence with q rows and context c sees the first c - q + i + 1 tokens.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 I] -> silu(first half) * second half, [T, I]."""
        ...


class Decoder(Protocol):
    """A loaded model. One call at a time."""

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Runs all layers over the batch's rows and writes their K and V into kv_cache
        [N, L, 2, S, G, D]: -> [R, E], the rows `batch.logits_indices` after the final norm."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The LM head: [R, E] -> [R, V] float32, freshly allocated: the caller may change it."""
        ...
