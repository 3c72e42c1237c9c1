"""How blocks get from the device to host and disk: copies, staging, writes.

    device ──copy──> host slot ──────────────write──> disk slot
           ──copy──> staging buffer ──whole?──write──> disk slot
           ──copy──> shared slot ─────whole?──put────> the shared store

A block is copied off the device without a pin, so that the device cache never waits for a copy: it
is the copy that loses. A committed block is not written again while it has its name, so a copy is
good if its block kept the name until the copy's end was seen here; `evicted` marks the copies of a
block that lost it as torn. Therefore nothing is written to disk, whose headers outlive us, before
its copy was found whole: without a host tier that takes a staging buffer and two transfers.

Bookkeeping for the engine's thread; bytes move on the mover's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from xllm.cache.copies import store
from xllm.cache.disk_tier import Attachment, DiskTier
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.mover import Mover, Transfer
from xllm.cache.slab import SlotWrite, aligned_buffer
from xllm.cache.slab_format import Buffer, SlotRecord, round_up
from xllm.cache.store_jobs import BlockToPut
from xllm.cache.store_tier import StoreTier
from xllm.errors import TierIOError
from xllm.protocol import BlockHash

STAGING_BYTES = 32 << 20
"""Of buffers between device and disk."""


@dataclass(frozen=True, slots=True)
class BlockToStore:
    hash: BlockHash
    parent: BlockHash | None
    block_id: int | None
    """On the device; None: not there."""


@dataclass(slots=True)
class StoreCounters:
    """Since the start, in blocks unless it says otherwise."""

    num_to_host: int = 0
    num_to_disk: int = 0
    num_dropped: int = 0
    """The backlog was full, no slot could be had, or the block went before its turn."""
    num_torn: int = 0
    """Evicted from the device while they were copied."""
    num_failed: int = 0
    """Their transfer was refused or failed."""
    copy_seconds: float = 0.0
    write_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Copy:
    """Device blocks being copied into slots of the host tier or into staging buffers."""

    attachment: Attachment | None
    """Whose slots they are; None: the host tier's, or the shared store's."""
    hashes: list[BlockHash] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    targets: list[Buffer] = field(default_factory=list)
    checksums: list[bytes] = field(default_factory=list)
    torn: set[int] = field(default_factory=set)
    """Block ids."""

    def add(self, block_hash: BlockHash, block_id: int, slot: int, target: Buffer) -> None:
        self.hashes.append(block_hash)
        self.block_ids.append(block_id)
        self.slots.append(slot)
        self.targets.append(target)

    def run(self, device: DeviceBlocks) -> None:
        """On a mover thread."""
        self.checksums = store(device, self.block_ids, self.targets)


@dataclass(frozen=True, slots=True)
class _Write:
    """One block on its way to the disk."""

    record: SlotRecord
    payload: Buffer
    host_slot: int | None = None
    """Pinned; None: `payload` is a staging buffer."""


class StoreTransfers:
    """Copies and writes under way. Every method takes a batch and starts one transfer for it."""

    def __init__(
        self,
        device: DeviceBlocks,
        mover: Mover,
        host: HostTier | None,
        disk: DiskTier | None,
        shared: StoreTier | None = None,
    ) -> None:
        self.counters = StoreCounters()
        self._device = device
        self._mover = mover
        self._host = host
        self._disk = disk
        self._shared = shared
        self._copies: dict[int, list[_Copy]] = {}
        """By block id."""
        self._staging_bytes = round_up(device.block_bytes)
        self._max_staging = max(2, STAGING_BYTES // self._staging_bytes)
        self._num_staging = 0
        """Buffers in use."""
        self._spare_staging: list[Buffer] = []
        self._num_transfers = 0

    @property
    def is_idle(self) -> bool:
        return self._num_transfers == 0

    @property
    def num_free_staging(self) -> int:
        """How many blocks `copy_to_disk` may be given now."""
        return self._max_staging - self._num_staging

    def evicted(self, block_id: int) -> None:
        """The block may be overwritten from now on."""
        for copy in self._copies.get(block_id, ()):
            copy.torn.add(block_id)

    def cleared(self) -> None:
        """Any block may be overwritten from now on."""
        for block_id in self._copies:
            self.evicted(block_id)

    def copy_to_host(self, blocks: Sequence[BlockToStore]) -> None:
        """Device to host, blocks that are on the device; those for which no slot can be had are
        dropped."""
        assert self._host is not None
        copy = _Copy(None)
        for block in blocks:
            assert block.block_id is not None
            slot = self._host.table.prepare_store(block.hash, block.parent)
            if slot is None:
                self.counters.num_dropped += 1
            else:
                copy.add(block.hash, block.block_id, slot, self._host.slot(slot))
        self._start_copy(copy, self._end_copy_to_host)

    def copy_to_disk(self, attachment: Attachment, blocks: Sequence[BlockToStore]) -> None:
        """Device to disk, by way of staging buffers: at most `num_free_staging` blocks."""
        copy = _Copy(attachment)
        for block in blocks:
            assert block.block_id is not None
            slot = attachment.table.prepare_store(block.hash, block.parent)
            if slot is None:
                self.counters.num_dropped += 1
            else:
                copy.add(block.hash, block.block_id, slot, self._take_staging())
        self._start_copy(copy, self._end_copy_to_staging)

    def write_to_disk(self, attachment: Attachment, blocks: Sequence[BlockToStore]) -> None:
        """Host to disk, blocks that are READY in the host tier; they are pinned meanwhile."""
        assert self._host is not None
        writes = []
        for block in blocks:
            slot = attachment.table.prepare_store(block.hash, block.parent)
            if slot is None:
                self.counters.num_dropped += 1
                continue
            stored = self._host.table.prepare_load(block.hash)
            assert stored is not None
            record = attachment.record(slot, block.hash, block.parent, stored.checksum)
            writes.append(_Write(record, self._host.slot(stored.slot), stored.slot))
        self._start_write(attachment, writes)

    def copy_to_shared(self, blocks: Sequence[BlockToStore]) -> None:
        """Device to the shared store by way of its slots, of which there have to be so many."""
        assert self._shared is not None
        copy = _Copy(None)
        for block in blocks:
            assert block.block_id is not None
            copy.add(block.hash, block.block_id, *self._shared.take_slot())
        self._start_copy(copy, self._end_copy_to_shared)

    def check_invariants(self) -> None:
        copies = {id(copy): copy for held in self._copies.values() for copy in held}
        for block_id, held in self._copies.items():
            assert held
            assert all(block_id in copy.block_ids for copy in held)
        num_held = sum(len(held) for held in self._copies.values())
        assert num_held == sum(len(copy.block_ids) for copy in copies.values())
        assert len(copies) <= self._num_transfers
        assert self._num_staging >= 0
        assert self._num_staging + len(self._spare_staging) <= self._max_staging
        if self.is_idle:
            assert self._num_staging == 0

    def _start_copy(self, copy: _Copy, on_end: Callable[[_Copy, Transfer | None], None]) -> None:
        if not copy.hashes:
            return
        if copy.attachment is not None:
            copy.attachment.begin_transfer()
        for block_id in copy.block_ids:
            self._copies.setdefault(block_id, []).append(copy)
        self._num_transfers += 1
        transfer = self._mover.try_start_store(
            lambda: copy.run(self._device), partial(on_end, copy)
        )
        if transfer is None:
            on_end(copy, None)

    def _end_copy(self, copy: _Copy, transfer: Transfer | None) -> list[bytes | None]:
        """Checksums of the blocks; None for those whose copy is worth nothing.

        `transfer`: None if the mover refused it.
        """
        self._num_transfers -= 1
        for block_id in copy.block_ids:
            held = self._copies[block_id]
            held.remove(copy)
            if not held:
                del self._copies[block_id]
        if transfer is None or transfer.error is not None:
            self.counters.num_failed += len(copy.hashes)
            return [None] * len(copy.hashes)
        self.counters.copy_seconds += transfer.seconds
        self.counters.num_torn += len(copy.torn)
        return [
            None if block_id in copy.torn else checksum
            for block_id, checksum in zip(copy.block_ids, copy.checksums, strict=True)
        ]

    def _end_copy_to_host(self, copy: _Copy, transfer: Transfer | None) -> None:
        assert self._host is not None
        for slot, checksum in zip(copy.slots, self._end_copy(copy, transfer), strict=True):
            self.counters.num_to_host += self._host.table.complete_store(slot, checksum)

    def _end_copy_to_shared(self, copy: _Copy, transfer: Transfer | None) -> None:
        """What is whole goes on to the store."""
        assert self._shared is not None
        blocks = []
        for name, slot, checksum in zip(
            copy.hashes, copy.slots, self._end_copy(copy, transfer), strict=True
        ):
            if checksum is None:
                self._shared.give_slot(slot)
            else:
                blocks.append(BlockToPut(name, slot, checksum))
        if blocks:
            self._shared.put(blocks)

    def _end_copy_to_staging(self, copy: _Copy, transfer: Transfer | None) -> None:
        """What is whole goes on to the disk, if that is still there."""
        attachment = copy.attachment
        assert attachment is not None
        writes = []
        for block_hash, slot, buffer, checksum in zip(
            copy.hashes, copy.slots, copy.targets, self._end_copy(copy, transfer), strict=True
        ):
            if checksum is None or attachment.is_retired:
                attachment.table.complete_store(slot, None)
                self._give_staging(buffer)
            else:
                parent = attachment.table.parent_of_slot(slot)
                writes.append(_Write(attachment.record(slot, block_hash, parent, checksum), buffer))
        self._start_write(attachment, writes)
        attachment.end_transfer()

    def _start_write(self, attachment: Attachment, writes: list[_Write]) -> None:
        if not writes:
            return
        attachment.begin_transfer()
        self._num_transfers += 1
        slot_writes = [SlotWrite(write.record, write.payload) for write in writes]
        on_end = partial(self._end_write, attachment, writes)
        transfer = self._mover.try_start_store(lambda: attachment.write_blocks(slot_writes), on_end)
        if transfer is None:
            on_end(None)

    def _end_write(
        self, attachment: Attachment, writes: list[_Write], transfer: Transfer | None
    ) -> None:
        self._num_transfers -= 1
        is_written = transfer is not None and transfer.error is None
        for write in writes:
            slot, checksum = write.record.slot, write.record.checksum
            is_stored = attachment.table.complete_store(slot, checksum if is_written else None)
            self.counters.num_to_disk += is_stored
            if write.host_slot is None:
                self._give_staging(write.payload)
            else:
                assert self._host is not None
                self._host.table.complete_load(write.host_slot)
        attachment.end_transfer()
        if transfer is None or transfer.error is not None:
            self.counters.num_failed += len(writes)
        if transfer is not None:
            self.counters.write_seconds += transfer.seconds
            if isinstance(transfer.error, TierIOError):
                assert self._disk is not None
                self._disk.detach(attachment, transfer.error)

    def _take_staging(self) -> Buffer:
        self._num_staging += 1
        assert self._num_staging <= self._max_staging
        return self._spare_staging.pop() if self._spare_staging else self._new_staging()

    def _new_staging(self) -> Buffer:
        return aligned_buffer(self._staging_bytes)

    def _give_staging(self, buffer: Buffer) -> None:
        self._num_staging -= 1
        self._spare_staging.append(buffer)
