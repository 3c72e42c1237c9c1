"""Host memory as a tier: one arena of equal slots, and the device's blocks seen from the host.

The arena is one anonymous mapping, so that slots are page-aligned: a slot can be read from disk and
written to it without a copy in between (O_DIRECT). On CUDA the mapping is page-locked, which lets
the GPU copy from it at full speed; torch's own pinned allocator would round its size up to a power
of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from xllm.cache.block_pool import BlockObserver
from xllm.cache.eviction import EvictionPolicyName, make_eviction_policy
from xllm.cache.memory import map_pages, populate, populate_in_background
from xllm.cache.slab_format import Buffer, round_up
from xllm.cache.tier import SlotTable
from xllm.errors import ConfigError


class DeviceBlocks(Protocol):
    """The device tier's bytes: block i of the KV cache is one extent of `block_bytes`.

    Called on mover threads, several at once, for different blocks. Both copies return when the
    bytes have arrived, and let the interpreter's lock go meanwhile. Whoever calls sees to it that a
    target is not in use; a source may be overwritten meanwhile, and the copy is thrown away then.
    """

    @property
    def block_bytes(self) -> int: ...

    def copy_out(self, block_ids: Sequence[int], targets: Sequence[Buffer]) -> None:
        """Device to host; targets: at least `block_bytes` each."""
        ...

    def copy_in(self, block_ids: Sequence[int], sources: Sequence[Buffer]) -> None:
        """Host to device; sources: at least `block_bytes` each."""
        ...

    def view(self, block_id: int) -> Buffer | None:
        """The block itself where the host can address it, [block_bytes]; else None."""
        ...


class HostMemoryBlocks:
    """Device blocks of a CPU worker: they are in host memory anyway."""

    def __init__(
        self, blocks: Buffer, copy_in: Callable[[Buffer, Buffer], None] = np.copyto
    ) -> None:
        """blocks: [N, block_bytes] uint8, rows contiguous: a view of the KV cache.

        `copy_in(target, source)` copies equal sizes and lets the interpreter's lock go meanwhile.
        """
        self._blocks = blocks
        self._copy_in = copy_in

    @property
    def block_bytes(self) -> int:
        return int(self._blocks.shape[1])

    def populate(self) -> None:
        """Takes all of the memory now, so that no load pays for page faults."""
        populate(self._blocks.reshape(-1))

    def populate_in_background(self) -> None:
        """The same, beside everything else: the first fetches may be before it."""
        populate_in_background(self._blocks.reshape(-1))

    def copy_out(self, block_ids: Sequence[int], targets: Sequence[Buffer]) -> None:
        for block_id, target in zip(block_ids, targets, strict=True):
            np.copyto(target[: self.block_bytes], self._blocks[block_id])

    def copy_in(self, block_ids: Sequence[int], sources: Sequence[Buffer]) -> None:
        for block_id, source in zip(block_ids, sources, strict=True):
            self._copy_in(self._blocks[block_id], source[: self.block_bytes])

    def view(self, block_id: int) -> Buffer:
        view: Buffer = self._blocks[block_id]
        return view


class HostTier:
    """Slots in host memory, and their books."""

    def __init__(
        self,
        num_slots: int,
        block_bytes: int,
        *,
        eviction_policy: EvictionPolicyName,
        clock: Callable[[], float],
        observer: BlockObserver | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Takes all of its memory now. Raises: ConfigError if there is not as much."""
        self.slot_stride = round_up(block_bytes)
        self.table = SlotTable(
            num_slots,
            make_eviction_policy(eviction_policy, num_slots),
            clock=clock,
            observer=observer,
        )
        arena = _allocate_arena(num_slots * self.slot_stride, pin_memory)
        self._slots = arena.reshape(num_slots, self.slot_stride)

    def slot(self, slot_id: int) -> Buffer:
        """The slot's memory, [slot_stride], page-aligned: for whoever prepared it."""
        slot: Buffer = self._slots[slot_id]
        return slot


def _allocate_arena(num_bytes: int, pin_memory: bool) -> Buffer:
    try:
        arena = map_pages(num_bytes)
    except OSError as error:
        raise ConfigError(
            f"the host cache of {num_bytes / 2**30:.1f} GiB cannot be allocated ({error}); "
            "lower --host_cache_size or --host_blocks_factor"
        ) from error
    populate(arena)
    if pin_memory and num_bytes:
        _page_lock(arena)
    return arena


def _page_lock(arena: Buffer) -> None:
    import torch

    status = torch.cuda.cudart().cudaHostRegister(arena.ctypes.data, arena.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(status) != 0:
        raise ConfigError(
            f"the host cache of {arena.nbytes / 2**30:.1f} GiB cannot be page-locked "
            f"({status}); lower --host_cache_size or --host_blocks_factor"
        )
