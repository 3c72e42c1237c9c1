"""What peers get of this worker's blocks: found, pinned, given back. For whoever holds the
books (`shared_books.py`).

A block is lent from where sending it costs least: from the host, which has its checksum; from the
device, if the host can address it; from the disk, which has to be read first. It is pinned there
from `lend` to `end`, so that it is neither evicted nor overwritten while it is sent. The checksum
of a device block is computed when it is first lent, and kept until the block loses its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm.cache.block_pool import BlockPool
from xllm.cache.disk_tier import Attachment, DiskTier
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.slab_format import Buffer
from xllm.cache.tier import TierName
from xllm.errors import TierIOError
from xllm.protocol import BlockHash

LOAN_BYTES = 4 << 20
LOAN_SHARE = 16
"""A loan pins at most one in so many device blocks, so that requests have room beside a few."""


@dataclass(slots=True)
class LentBlock:
    """One pinned block. `payload` and `checksum` are for the serving thread to complete."""

    hash: BlockHash
    tier: TierName
    slot: int
    """In the tier; on the device the block id."""
    payload: Buffer | None
    """[block_bytes]; None: on disk, to be read."""
    checksum: bytes | None
    """None: not computed yet."""
    is_damaged: bool = False
    """What was read is not what was stored."""


@dataclass(slots=True, eq=False)
class Loan:
    """The blocks asked for with one call, in its order; None: a miss."""

    blocks: list[LentBlock | None]
    attachment: Attachment | None
    """Of the disk, if a block is from there."""
    error: TierIOError | None = None
    """What its reading failed with."""
    num_sent: dict[TierName, int] = field(default_factory=dict)


@dataclass(slots=True)
class LendCounters:
    """Since the start, in blocks."""

    served: dict[TierName, int] = field(
        default_factory=lambda: dict.fromkeys((TierName.DEVICE, TierName.HOST, TierName.DISK), 0)
    )
    num_missed: int = 0
    """Asked for, and not here."""


class Lender:
    """Pins of blocks that are being served."""

    def __init__(
        self,
        pool: BlockPool,
        device: DeviceBlocks,
        host: HostTier | None,
        disk: DiskTier | None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_idle` is called, with the books, when the last loan has ended: what was published of
        the pool meanwhile counts lent blocks as used."""
        self.counters = LendCounters()
        share = max(1, pool.num_blocks // LOAN_SHARE)
        self.max_blocks = max(1, min(LOAN_BYTES // device.block_bytes, share))
        """Of one loan."""
        self._pool = pool
        self._device = device
        self._host = host
        self._disk = disk
        self._on_idle = on_idle
        self._checksums: dict[int, bytes] = {}
        """By block id: of device blocks that have kept their name since it was computed."""
        self._loans: set[Loan] = set()

    def lend(self, hashes: Sequence[BlockHash]) -> Loan:
        """Pins those of at most `max_blocks` blocks that are here, until `end`."""
        assert len(hashes) <= self.max_blocks
        attachment = None if self._disk is None else self._disk.attachment
        blocks = [self._pin(block_hash, attachment) for block_hash in hashes]
        if not any(block is not None and block.tier is TierName.DISK for block in blocks):
            attachment = None
        if attachment is not None:
            attachment.begin_transfer()
        self.counters.num_missed += blocks.count(None)
        loan = Loan(blocks, attachment)
        self._loans.add(loan)
        return loan

    def end(self, loan: Loan) -> None:
        """Gives the pins back, whatever became of the blocks."""
        self._loans.remove(loan)
        for tier, num_sent in loan.num_sent.items():
            self.counters.served[tier] += num_sent
        was_sent = bool(loan.num_sent.get(TierName.DEVICE))
        for block in loan.blocks:
            if block is not None:
                self._unpin(block, loan.attachment, was_sent)
        if loan.attachment is not None:
            loan.attachment.end_transfer()
            if loan.error is not None:
                assert self._disk is not None
                self._disk.detach(loan.attachment, loan.error)
        if not self._loans:
            self._on_idle()

    def evicted(self, block_id: int) -> None:
        """A device block has lost its name."""
        self._checksums.pop(block_id, None)

    def cleared(self) -> None:
        """All of them have; what is pinned keeps its bytes until it is given back."""
        self._checksums.clear()

    def snapshot(self) -> LendCounters:
        return LendCounters(dict(self.counters.served), self.counters.num_missed)

    @property
    def num_loans(self) -> int:
        return len(self._loans)

    @property
    def lent_block_ids(self) -> list[int]:
        """Device blocks, once for each reference."""
        return [
            block.slot
            for loan in self._loans
            for block in loan.blocks
            if block is not None and block.tier is TierName.DEVICE
        ]

    def _pin(self, block_hash: BlockHash, attachment: Attachment | None) -> LentBlock | None:
        if self._host is not None:
            stored = self._host.table.prepare_load(block_hash)
            if stored is not None:
                payload = self._host.slot(stored.slot)[: self._device.block_bytes]
                return LentBlock(block_hash, TierName.HOST, stored.slot, payload, stored.checksum)
        block_id = self._pool.lookup(block_hash)
        if block_id is not None:
            view = self._device.view(block_id)
            if view is not None:
                self._pool.acquire((block_id,))
                checksum = self._checksums.get(block_id)
                return LentBlock(block_hash, TierName.DEVICE, block_id, view, checksum)
        if attachment is not None:
            stored = attachment.table.prepare_load(block_hash)
            if stored is not None:
                return LentBlock(block_hash, TierName.DISK, stored.slot, None, stored.checksum)
        return None

    def _unpin(self, block: LentBlock, attachment: Attachment | None, was_sent: bool) -> None:
        if block.tier is TierName.DEVICE:
            if block.checksum is not None and self._pool.hash_of(block.slot) == block.hash:
                self._checksums[block.slot] = block.checksum
            self._pool.release([block.slot], has_peer=was_sent)
        elif block.tier is TierName.HOST:
            assert self._host is not None
            self._host.table.complete_load(block.slot)
        else:
            assert attachment is not None
            attachment.table.complete_load(block.slot)
            if block.is_damaged:
                attachment.table.discard(block.hash)
