"""Two small kernels that FlashInfer has not: K and V written except where the slot is -1, and the
norm of a sum whose residual is float32. One program per row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def _write(
    key: Any,
    value: Any,
    slots: Any,
    kv_layer: Any,
    key_stride: Any,
    value_stride: Any,
    block_stride: Any,
    part_stride: Any,
    block_size: Any,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
) -> None:
    """WIDTH: G D, elements of a token's K."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)  # int64, so offsets are, too
    if slot >= 0:
        at = tl.arange(0, PADDED_WIDTH)
        is_inside = at < WIDTH
        token = slot // block_size * block_stride + slot % block_size * WIDTH
        keys = tl.load(key + row * key_stride + at, mask=is_inside)
        values = tl.load(value + row * value_stride + at, mask=is_inside)
        tl.store(kv_layer + token + at, keys, mask=is_inside)
        tl.store(kv_layer + token + part_stride + at, values, mask=is_inside)


def _add_norm(
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
) -> None:
    at = tl.arange(0, PADDED_WIDTH)
    is_inside = at < WIDTH
    start = tl.program_id(0).to(tl.int64) * WIDTH
    added = tl.load(x + start + at, mask=is_inside, other=0.0).to(tl.float32)
    total = added + tl.load(residual + start + at, mask=is_inside, other=0.0)
    tl.store(residual + start + at, total, mask=is_inside)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / WIDTH + eps)
    normed = total * scale * tl.load(weight + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(x + start + at, normed.to(x.dtype.element_ty), mask=is_inside)


_write_kernel = triton.jit(_write)
_add_norm_kernel = triton.jit(_add_norm)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor, kv_layer: torch.Tensor
) -> None:
    """key, value [T, G, D], each row contiguous; slot_mapping [T] int64, -1: not written; kv_layer
    [N, 2, S, G, D], each token contiguous and next to the one before it in its block."""
    width = kv_layer.shape[3] * kv_layer.shape[4]
    assert key.stride()[1:] == value.stride()[1:] == kv_layer.stride()[3:] == (key.shape[2], 1)
    assert kv_layer.stride(2) == width
    _write_kernel[(key.shape[0],)](
        key,
        value,
        slot_mapping,
        kv_layer,
        key.stride(0),
        value.stride(0),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.shape[2],
        WIDTH=width,
        PADDED_WIDTH=triton.next_power_of_2(width),
    )


def add_rms_norm_(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual [T, E] float32 += x [T, E]; x = rms_norm(residual) * weight. Both contiguous."""
    num_rows, width = x.shape
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert residual.dtype == torch.float32
    padded_width = triton.next_power_of_2(width)
    num_warps = min(16, max(4, padded_width // 256))
    _add_norm_kernel[(num_rows,)](
        x, residual, weight, eps, WIDTH=width, PADDED_WIDTH=padded_width, num_warps=num_warps
    )
