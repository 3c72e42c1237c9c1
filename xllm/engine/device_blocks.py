"""The blocks of a KV cache as the tiers below see them: extents of bytes, wherever they are."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial

import torch

from xllm.cache.host_tier import DeviceBlocks, HostMemoryBlocks
from xllm.cache.slab_format import Buffer
from xllm.engine.kernels.cpu.native import copy_past_cache


def device_blocks(cache: torch.Tensor, library: ctypes.CDLL | None = None) -> DeviceBlocks:
    """cache: [N, ...], blocks contiguous; `library`: the native kernels, where they run."""
    blocks = cache.view(torch.uint8).view(cache.shape[0], -1)
    if cache.is_cuda:
        return CudaBlocks(blocks)
    if library is None:
        return HostMemoryBlocks(blocks.numpy())
    return HostMemoryBlocks(blocks.numpy(), partial(copy_past_cache, library))


class CudaBlocks:
    """Implements `DeviceBlocks` for a GPU: each direction has its own stream, so copies run beside
    each other and beside the engine's kernels.

    A copy waits for what the engine's stream had been given before it began: a chunk of a prompt
    draws no token, so the engine commits its blocks before the device has written them, and may
    give up blocks that a step still reads. What the engine launches after a copy was waited
    for, here, comes after it. At full speed where the host's side is page-locked (see `HostTier`).
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        """blocks: [N, block_bytes] uint8."""
        self._blocks = blocks
        self._out, self._in = (_new_stream(blocks.device) for _ in range(2))
        self._computing = torch.cuda.default_stream(blocks.device)

    @property
    def block_bytes(self) -> int:
        return self._blocks.shape[1]

    def copy_out(self, block_ids: Sequence[int], targets: Sequence[Buffer]) -> None:
        self._out.wait_stream(self._computing)
        with torch.cuda.stream(self._out):
            for block_id, target in zip(block_ids, targets, strict=True):
                self._on_host(target).copy_(self._blocks[block_id], non_blocking=True)
        self._out.synchronize()

    def copy_in(self, block_ids: Sequence[int], sources: Sequence[Buffer]) -> None:
        self._in.wait_stream(self._computing)
        with torch.cuda.stream(self._in):
            for block_id, source in zip(block_ids, sources, strict=True):
                self._blocks[block_id].copy_(self._on_host(source), non_blocking=True)
        self._in.synchronize()

    def view(self, block_id: int) -> None:
        return None

    def _on_host(self, buffer: Buffer) -> torch.Tensor:
        return torch.from_numpy(buffer[: self.block_bytes])


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
