"""The disk as a tier: a slab file, its books, and coming and going of the medium.

    attached ──any TierIOError──> detached ──attempt after 1, 2, 4 .. 60 s──> attached

While detached, every lookup is a miss and nothing is written; one log line and one count say so.
Attached again, what the slab then holds is found again. Books and file live and die together, as an
`Attachment`: transfers that are still under way when the tier detaches complete against their own
attachment, whose file is closed by the last of them.

Bytes move on mover threads (`read_blocks`, `write_blocks`), everything else is for the engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm.cache.block_pool import BlockEvent, BlockEventKind, BlockObserver
from xllm.cache.eviction import EvictionPolicyName, make_eviction_policy
from xllm.cache.slab import OS_IO, SlabFile, SlotWrite, VectorIO
from xllm.cache.slab_format import (
    Buffer,
    SlabGeometry,
    SlotRecord,
    adjacent_runs,
    checksum_of,
)
from xllm.cache.tier import SlotTable
from xllm.errors import ConfigError, TierIOError
from xllm.protocol import BlockHash

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0


class Attachment:
    """One opening of the slab, from `open` until the last transfer has ended."""

    def __init__(self, slab: SlabFile, table: SlotTable, next_sequence: int) -> None:
        self.table = table
        self._slab = slab
        self._next_sequence = next_sequence
        self._num_transfers = 0
        self.is_retired = False
        """No transfer may begin any more."""

    @property
    def slot_stride(self) -> int:
        return self._slab.geometry.slot_stride

    @property
    def is_direct(self) -> bool:
        """Whether buffers have to be aligned."""
        return self._slab.is_direct

    def begin_transfer(self) -> None:
        """Keeps the file open until `end_transfer`."""
        assert not self.is_retired
        self._num_transfers += 1

    def end_transfer(self) -> None:
        self._num_transfers -= 1
        self._close_if_idle()

    def retire(self) -> None:
        """No transfer begins any more; the file is closed after the last one."""
        self.is_retired = True
        self._close_if_idle()

    def record(
        self, slot: int, block_hash: BlockHash, parent: BlockHash | None, checksum: bytes
    ) -> SlotRecord:
        """The header for a slot that is about to be written."""
        self._next_sequence += 1
        return SlotRecord(slot, self._next_sequence - 1, block_hash, parent, checksum)

    def clear_file(self) -> Callable[[], None]:
        """What makes all that was written so far a miss after a restart, too."""
        sequence = self._next_sequence
        return lambda: self._slab.forget_before(sequence)

    def read_blocks(
        self, slots: Sequence[int], targets: Sequence[Buffer], checksums: Sequence[bytes]
    ) -> list[bool]:
        """Reads blocks and says which are sound. On a mover thread.

        targets: `slot_stride` bytes each; aligned, where `is_direct`. Raises: TierIOError.
        """
        order = sorted(range(len(slots)), key=slots.__getitem__)
        for run in adjacent_runs([slots[i] for i in order]):
            self._slab.read(slots[order[run.start]], [targets[i] for i in order[run]])
        payload_bytes = self._slab.geometry.payload_bytes
        return [
            checksum_of(target[:payload_bytes]) == checksum
            for target, checksum in zip(targets, checksums, strict=True)
        ]

    def write_blocks(self, writes: Sequence[SlotWrite]) -> None:
        """On a mover thread. Raises: TierIOError."""
        self._slab.write(writes)

    def sync(self) -> None:
        """On a mover thread, or at the end. Raises: TierIOError."""
        self._slab.sync()

    def _close_if_idle(self) -> None:
        if self.is_retired and self._num_transfers == 0:
            self._slab.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTierConfig:
    """`directory` is the cache root's own: see `cache_directory`."""

    directory: Path
    size_bytes: int
    block_bytes: int
    root: BlockHash
    eviction_policy: EvictionPolicyName

    @property
    def geometry(self) -> SlabGeometry:
        return SlabGeometry.within(self.size_bytes, self.block_bytes)


def cache_directory(disk_cache_dir: Path, root: BlockHash) -> Path:
    """Where blocks of a cache root (without salt) live: other models, dtypes and block sizes have
    other roots, and never meet."""
    return disk_cache_dir / root.hex()


class DiskTier:
    """The disk tier of one worker, attached or not."""

    def __init__(
        self,
        config: DiskTierConfig,
        *,
        clock: Callable[[], float],
        observer: BlockObserver | None = None,
        io: VectorIO = OS_IO,
    ) -> None:
        """Attaches at once if it can.

        Raises: ConfigError if the size does not hold a block, or another process has the slab.
        """
        if config.geometry.num_slots == 0:
            raise ConfigError(
                f"--disk_cache_size: {config.size_bytes} bytes do not hold one block "
                f"of {config.block_bytes} bytes"
            )
        self.config = config
        self.num_detachments = 0
        self.attachment: Attachment | None = None
        self._clock = clock
        self._observer = observer
        self._io = io
        self._is_closed = False
        self._events: list[BlockEvent] = []
        self._retry_s = FIRST_RETRY_S
        self._retry_at: float | None = None
        """None: attached, or an attempt is under way."""
        try:
            self.attachment = self.open()
        except TierIOError as error:
            self._report(error)

    @property
    def table(self) -> SlotTable | None:
        """The books; None while detached."""
        return None if self.attachment is None else self.attachment.table

    @property
    def retry_at(self) -> float | None:
        """When `should_retry` will say yes; None: never as things are."""
        return self._retry_at

    def open(self) -> Attachment:
        """Opens the slab and rebuilds the index; shares nothing with this object's state, so that
        a mover thread may do it. Raises: ConfigError, TierIOError."""
        config = self.config
        geometry = config.geometry
        slab = SlabFile(config.directory, geometry, config.root, io=self._io)
        try:
            records = slab.scan()
        except TierIOError:
            slab.close()
            raise
        table = SlotTable(
            geometry.num_slots,
            make_eviction_policy(config.eviction_policy, geometry.num_slots),
            clock=self._clock,
            observer=self._observer,
        )
        # Of two slots with one name, the older one was left over when the block was evicted.
        newest = {record.hash: record.slot for record in records}
        for record in records:
            if newest[record.hash] == record.slot:
                table.restore(record.slot, record.hash, record.parent, record.checksum)
        table.finish_restore()
        logger.info(
            "disk_tier_attached path=%s slots=%d blocks=%d direct=%s",
            slab.path,
            geometry.num_slots,
            len(table),
            slab.is_direct,
        )
        next_sequence = max(slab.first_sequence, records[-1].sequence + 1 if records else 0)
        return Attachment(slab, table, next_sequence)

    def detach(self, attachment: Attachment, error: Exception) -> None:
        """The medium failed in a transfer of `attachment`: from now on everything is a miss."""
        if attachment is self.attachment:
            self.attachment = None
            self._events = [BlockEvent(BlockEventKind.CLEARED)]
            attachment.retire()
            self._report(error)

    def should_retry(self) -> bool:
        """Whether `open` should be tried now; True once for each attempt."""
        if self._retry_at is None or self._clock() < self._retry_at:
            return False
        self._retry_at = None
        return True

    def complete_retry(self, result: Attachment | Exception) -> None:
        """An attempt has ended."""
        if self._is_closed:
            if isinstance(result, Attachment):
                result.retire()
        elif isinstance(result, Attachment):
            self.attachment = result
            self._retry_s = FIRST_RETRY_S
        else:
            logger.info("disk_tier_still_detached error=%r", str(result))
            self._schedule_retry()

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order; detaching clears the tier."""
        events, self._events = self._events, []
        if self.attachment is not None:
            events += self.attachment.table.take_events()
        return events

    def close(self) -> None:
        """Makes what was written durable and gives the slab back. Idempotent."""
        attachment, self.attachment = self.attachment, None
        self._is_closed = True
        self._retry_at = None
        if attachment is None:
            return
        try:
            attachment.sync()
        except TierIOError as error:
            logger.error("disk_tier_sync_failed error=%r", str(error))
        attachment.retire()

    def _report(self, error: Exception) -> None:
        self.num_detachments += 1
        logger.error(
            "disk_tier_detached path=%s error=%r retry_s=%g",
            self.config.directory,
            str(error),
            self._retry_s,
        )
        self._schedule_retry()

    def _schedule_retry(self) -> None:
        self._retry_at = self._clock() + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
