"""Tiers whose blocks weigh nothing: all bookkeeping is the real one, moving a block moves 16 bytes.

Every slot of the host tier is the same memory, and the slab is nowhere; so a replay can have as
many slots as it likes and measures the code rather than the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xllm.cache.disk_tier import Attachment, DiskTier, DiskTierConfig
from xllm.cache.eviction import EvictionPolicyName, make_eviction_policy
from xllm.cache.host_tier import HostTier
from xllm.cache.mover import Mover
from xllm.cache.slab import SlabFile, SlotWrite
from xllm.cache.slab_format import Buffer, SlabGeometry
from xllm.cache.stores import DiskWritePolicy
from xllm.cache.tier import SlotTable
from xllm.cache.tiers import Tiers
from xllm.protocol import BlockHash

_BLOCK_BYTES = 16


def make_tiers(mover: Mover, num_host: int, num_disk: int, policy: EvictionPolicyName) -> Tiers:
    """A host and a disk tier of that many slots."""
    return Tiers(
        _WeightlessBlocks(),
        mover,
        host=_WeightlessHost(num_host, policy),
        disk=_WeightlessDisk(num_disk, policy),
        disk_write_policy=DiskWritePolicy.WRITE_THROUGH,
        clock=_no_time,
    )


def _no_time() -> float:
    return 0.0


def _make_table(num_slots: int, policy: EvictionPolicyName) -> SlotTable:
    return SlotTable(num_slots, make_eviction_policy(policy, num_slots), clock=_no_time)


class _WeightlessBlocks:
    block_bytes = _BLOCK_BYTES

    def copy_out(self, block_ids: Sequence[int], targets: Sequence[Buffer]) -> None:
        pass

    def copy_in(self, block_ids: Sequence[int], sources: Sequence[Buffer]) -> None:
        pass

    def view(self, block_id: int) -> None:
        return None


class _WeightlessHost(HostTier):
    def __init__(self, num_slots: int, policy: EvictionPolicyName) -> None:
        self.slot_stride = _BLOCK_BYTES
        self.table = _make_table(num_slots, policy)
        self._slots = np.broadcast_to(np.zeros(_BLOCK_BYTES, dtype=np.uint8), (num_slots, 16))


class _WeightlessSlab(SlabFile):
    def __init__(self, geometry: SlabGeometry) -> None:
        self.geometry = geometry
        self.is_direct = False

    def read(self, first_slot: int, buffers: Sequence[Buffer]) -> None:
        pass

    def write(self, writes: Sequence[SlotWrite]) -> None:
        pass


class _WeightlessDisk(DiskTier):
    def __init__(self, num_slots: int, policy: EvictionPolicyName) -> None:
        self._geometry = SlabGeometry(num_slots, _BLOCK_BYTES)
        self._policy = policy
        config = DiskTierConfig(
            directory=Path(),
            size_bytes=1 << 60,
            block_bytes=_BLOCK_BYTES,
            root=BlockHash(bytes(16)),
            eviction_policy=policy,
        )
        super().__init__(config, clock=_no_time)

    def open(self) -> Attachment:
        table = _make_table(self._geometry.num_slots, self._policy)
        return Attachment(_WeightlessSlab(self._geometry), table, 1)
