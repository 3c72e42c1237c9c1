"""K and V of a step's rows into their token slots, in one launch."""

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
    """One program per row. WIDTH: G D, elements of a token's K."""
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


_write_kernel = triton.jit(_write)


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
