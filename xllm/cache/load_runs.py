"""What one transfer brings: neighbours of a ticket from one source, pinned there while it lasts.

Each kind of source says how its blocks are pinned, how their bytes come to the device, and what
an unsound one means; `loads.py` does not know one from the other.

For the engine's thread; what `start` begins runs on other threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from xllm.cache.copies import load_from_disk, load_from_host
from xllm.cache.disk_tier import Attachment, DiskTier
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.mover import Mover, Transfer, TransferGroup
from xllm.cache.peer_book import PeerBook
from xllm.cache.peer_client import PeerClient
from xllm.cache.peer_fetch import BlockOutcome, Peer, PeerFetch
from xllm.cache.peer_wire import MAX_FETCH_BLOCKS
from xllm.cache.tier import SlotTable, StoredBlock
from xllm.errors import TierIOError
from xllm.protocol import BlockHash
from xllm.tracing import NO_SPAN, SpanKind

OnEnd = Callable[[Transfer], None]

TRANSFER_BYTES = 4 << 20
"""Of one transfer: large enough for the disk and for what a transfer costs, small enough that a few
threads share a prompt evenly."""


class LoadRun(Protocol):
    """One transfer, from pinning its blocks to unpinning them."""

    @property
    def max_blocks(self) -> int:
        """At least one."""
        ...

    def try_add(self, block_hash: BlockHash) -> bool:
        """Pins the next block; False: it is not there any more."""
        ...

    def start(
        self, block_ids: Sequence[int], deadline: float, on_end: OnEnd, group: TransferGroup
    ) -> Transfer:
        """Begins to bring the blocks to these device blocks."""
        ...

    def end(self, transfer: Transfer) -> tuple[list[bool], int]:
        """The transfer has ended: unpins the blocks and drops damaged ones where they were.

        -> which blocks are sound on the device, and how many came damaged.
        """
        ...

    def abandon(self) -> None:
        """The transfer was taken back, or never begun: unpins the blocks."""
        ...


class LocalRun:
    """From the host or the disk tier."""

    def __init__(
        self,
        device: DeviceBlocks,
        mover: Mover,
        table: SlotTable,
        tier: HostTier | DiskTier,
        attachment: Attachment | None,
    ) -> None:
        """`attachment`: of a disk tier, whose `table` it is."""
        self._device = device
        self._mover = mover
        self._table = table
        self._tier = tier
        self._attachment = attachment
        self._hashes: list[BlockHash] = []
        self._stored: list[StoredBlock] = []
        self._sound: list[bool] = []
        self._is_begun = False

    @property
    def max_blocks(self) -> int:
        return _blocks_of(self._device.block_bytes)

    def try_add(self, block_hash: BlockHash) -> bool:
        stored = self._table.prepare_load(block_hash)
        if stored is None:
            return False
        self._hashes.append(block_hash)
        self._stored.append(stored)
        return True

    def start(
        self, block_ids: Sequence[int], deadline: float, on_end: OnEnd, group: TransferGroup
    ) -> Transfer:
        if self._attachment is not None:
            self._attachment.begin_transfer()
        self._is_begun = True
        return self._mover.start_load(lambda: self._work(block_ids), on_end, group)

    def end(self, transfer: Transfer) -> tuple[list[bool], int]:
        num_corrupt = 0
        if transfer.error is not None:
            self._sound = [False] * len(self._stored)
        self.abandon()
        if transfer.error is None:
            for block_hash, sound in zip(self._hashes, self._sound, strict=True):
                if not sound:
                    num_corrupt += 1
                    self._table.discard(block_hash)
        elif isinstance(transfer.error, TierIOError) and self._attachment is not None:
            assert isinstance(self._tier, DiskTier)
            self._tier.detach(self._attachment, transfer.error)
        return self._sound, num_corrupt

    def abandon(self) -> None:
        for stored in self._stored:
            self._table.complete_load(stored.slot)
        if self._attachment is not None and self._is_begun:
            self._attachment.end_transfer()

    def _work(self, block_ids: Sequence[int]) -> None:
        """On a mover thread."""
        slots = [stored.slot for stored in self._stored]
        checksums = [stored.checksum for stored in self._stored]
        if self._attachment is not None:
            self._sound = load_from_disk(
                self._attachment, slots, checksums, self._device, block_ids
            )
        else:
            assert isinstance(self._tier, HostTier)
            self._sound = load_from_host(self._tier, slots, checksums, self._device, block_ids)


class PeerRun:
    """From a peer: nothing is pinned before it is asked, and it may not have a block any more."""

    def __init__(
        self, client: PeerClient, book: PeerBook, mover: Mover, peer: Peer, trace: str = ""
    ) -> None:
        """`trace`: whose child the span of the fetch is."""
        self._client = client
        self._book = book
        self._mover = mover
        self._peer = peer
        self._trace = trace
        self._span = NO_SPAN
        self._hashes: list[BlockHash] = []
        self._fetch: PeerFetch | None = None

    @property
    def max_blocks(self) -> int:
        return min(_blocks_of(self._client.layout.block_bytes), MAX_FETCH_BLOCKS)

    def try_add(self, block_hash: BlockHash) -> bool:
        self._hashes.append(block_hash)
        return True

    def start(
        self, block_ids: Sequence[int], deadline: float, on_end: OnEnd, group: TransferGroup
    ) -> Transfer:
        give_up_at = deadline + self._client.limits.grace_s
        if self._trace:
            self._span = self._client.tracer.start(
                "fetch blocks",
                self._trace,
                kind=SpanKind.CLIENT,
                attributes={
                    "xllm.peer": self._peer.worker_id,
                    "xllm.num_blocks": len(self._hashes),
                },
            )
        trace = self._span.traceparent
        fetch = self._fetch = PeerFetch(self._peer, self._hashes, block_ids, give_up_at, trace)
        transfer = self._mover.open_elsewhere(on_end, lambda: self._client.try_cancel(fetch), group)
        self._client.start(fetch, transfer)
        return transfer

    def end(self, transfer: Transfer) -> tuple[list[bool], int]:
        assert self._fetch is not None
        outcomes = self._fetch.outcomes
        # What came before the peer failed is as good as any.
        sound = [outcome is BlockOutcome.SOUND for outcome in outcomes]
        num_corrupt = outcomes.count(BlockOutcome.CORRUPT)
        counters = self._book.counters
        counters.num_corrupt += num_corrupt
        if transfer.error is not None or num_corrupt:
            self._book.failed(self._peer)
        else:
            counters.num_absent += outcomes.count(BlockOutcome.ABSENT)
        self._span.set({"xllm.num_sound": sound.count(True), "xllm.num_corrupt": num_corrupt})
        self._span.end(error="" if transfer.error is None else str(transfer.error))
        return sound, num_corrupt

    def abandon(self) -> None:
        """Nothing is held here."""
        self._span.end(error="taken back before it was sent")


def _blocks_of(block_bytes: int) -> int:
    """In a transfer."""
    return max(1, TRANSFER_BYTES // block_bytes)
