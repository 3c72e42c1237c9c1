"""The tiers below the device, as the KV cache and the scheduler see them.

    scheduler / KVCache                 Tiers                     mover threads
    -------------------                 -----                     -------------
    match ──────────────────────────>   SlotTable lookups
    start_load ─────────────────────>   Loader: pins, tickets ──> copies, reads
    committed, used, evicted, cleared > Storer: backlogs ───────> copies, writes
    poll, once a step ──────────────>   ends of transfers <────── queue

All methods are synchronous and for the engine's thread, and none of them waits for bytes; mover
threads touch bytes and nothing else. `on_ended` is called on a mover thread when `poll` has
something to do: an idle engine has to wake up for it, and at `next_deadline`.

How a request's blocks come up:

 1. After the prefix that the device holds, `match` says how much more of the chain lies below.
 2. The scheduler reserves device blocks for all that the prompt needs, or none, and gives those of
    the matched part to `start_load`; the request is LOADING.
 3. Each step, `poll` returns the tickets that are done: all arrived, one failed, or the deadline
    passed. The first `num_arrived` blocks are on the device and verified: the scheduler commits
    them and computes the rest. The blocks in `busy_block_ids` are still being written to: the
    request needs others in their place, and `take_returned_blocks` gives them back when they are
    free.
 4. A request that is preempted or aborted while LOADING calls `cancel`, and frees its device blocks
    but for the busy ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from xllm.cache.block_pool import BlockEvent
from xllm.cache.disk_tier import Attachment, DiskTier
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.lender import LendCounters, Lender
from xllm.cache.loads import BlockSource, LoadCounters, Loader, LoadTicket
from xllm.cache.mover import Mover, Transfer
from xllm.cache.peer_book import PeerCounters
from xllm.cache.peers import PRIOR_BYTES_PER_S, Peers
from xllm.cache.store_transfers import StoreCounters
from xllm.cache.stores import DiskWritePolicy, Storer
from xllm.cache.tier import Lookup, SlotTable, TableStatistics, TierName
from xllm.errors import ConfigError, TierIOError
from xllm.protocol import BlockHash, FetchRange

CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class TiersStatistics:
    """A snapshot, for metrics. Counts since the start."""

    tables: dict[TierName, TableStatistics]
    """Of the tiers that are there; a detached disk is not."""
    block_bytes: int
    blocks_loaded: dict[TierName, int]
    blocks_stored: dict[TierName, int]
    """To host and disk."""
    load_bytes: dict[TierName, int]
    load_seconds: dict[TierName, float]
    bytes_per_s: dict[TierName, float | None]
    loads: LoadCounters
    stores: StoreCounters
    num_detachments: int
    victims_used_at: dict[TierName, float] = field(default_factory=dict)
    """Of tiers that are full: when what they evict next was last used, by the tiers' clock."""
    peers: PeerCounters | None = None
    """None: none are asked."""
    num_peers_avoided: int = 0
    lent: LendCounters | None = None
    """To peers; None: they get nothing here."""

    def block_s(self, tier: TierName) -> float | None:
        """What bringing up a block of `tier` takes; None: it never had one.

        A rate that is out of date is better than none, and before the first load that of the
        stores says roughly how fast the medium is.
        """
        rate = self.bytes_per_s.get(tier)
        if not rate and self.load_bytes.get(tier):
            rate = self.load_bytes[tier] / self.load_seconds[tier]
        if not rate and self.blocks_stored.get(tier):
            seconds = self.stores.copy_seconds
            if tier is TierName.DISK:
                seconds = self.stores.write_seconds
            rate = self.blocks_stored[tier] * self.block_bytes / seconds if seconds else None
        return self.block_bytes / rate if rate else None

    @property
    def peer_block_s(self) -> float | None:
        """What fetching a block is expected to take; None: no peer is asked.

        A rate that is out of date says nothing: the next peer may be as quick as any.
        """
        if self.peers is None:
            return None
        return self.block_bytes / (self.bytes_per_s[TierName.REMOTE] or PRIOR_BYTES_PER_S)


class Tiers:
    """Host and disk below one device cache, and peers beside it; any of them may be missing."""

    def __init__(
        self,
        device: DeviceBlocks,
        mover: Mover,
        *,
        host: HostTier | None,
        disk: DiskTier | None,
        disk_write_policy: DiskWritePolicy,
        clock: Callable[[], float],
        cold_device_blocks: Callable[[int], list[BlockHash]] = lambda limit: [],
        peers: Peers | None = None,
        lender: Lender | None = None,
    ) -> None:
        """`cold_device_blocks(n)`: up to n names that the device would evict next, in that order;
        asked only under write_back without a host tier. `lender`: of these tiers, for peers."""
        self.host = host
        self.disk = disk
        self._device = device
        self._mover = mover
        self.peers = peers
        self.lender = lender
        self._loader = Loader(device, mover, host, disk, clock, peers)
        self._storer = Storer(device, mover, host, disk, disk_write_policy, cold_device_blocks)
        self._held: set[BlockHash] = set()
        self._retries = 0
        """Attempts to attach that are under way."""

    @property
    def names(self) -> list[TierName]:
        """From fast to slow; a detached disk is one, too."""
        tiers = [] if self.host is None else [TierName.HOST]
        return tiers if self.disk is None else [*tiers, TierName.DISK]

    @property
    def lent_block_ids(self) -> list[int]:
        """Device blocks that peers are being sent, once for each reference that keeps them."""
        return [] if self.lender is None else self.lender.lent_block_ids

    @property
    def next_deadline(self) -> float | None:
        """When `poll` must be called next, if nothing ends before; on the clock given."""
        deadlines = (self._loader.next_deadline, None if self.disk is None else self.disk.retry_at)
        return min((at for at in deadlines if at is not None), default=None)

    @property
    def is_idle(self) -> bool:
        """No transfer is wanted or under way."""
        return self._loader.is_idle and self._storer.is_idle and self._retries == 0

    def match(
        self,
        hashes: Sequence[BlockHash],
        block_compute_s: float | None = None,
        fetch: Sequence[FetchRange] = (),
        first: int = 0,
    ) -> list[BlockSource]:
        """Where each leading block of `hashes` would be loaded from; changes nothing.

        `block_compute_s`: what computing one block takes; a tier that is known to be slower is not
        read. fetch: which peers have blocks that are not here; `first` is the index that it gives
        the first of `hashes`. Valid until the next call of anything else.
        """
        tables = [
            (BlockSource(tier), table)
            for tier, table in self._tables()
            if not self._is_slower(tier, block_compute_s)
        ]
        book = None if self.peers is None or not fetch else self.peers.book
        bytes_per_s = self._device.block_bytes / block_compute_s if block_compute_s else None
        sources: list[BlockSource] = []
        for index, block_hash in enumerate(hashes, first):
            for source, table in tables:
                if table.lookup(block_hash) is Lookup.HIT:
                    sources.append(source)
                    break
            else:
                peer = None if book is None else book.find(fetch, index, bytes_per_s)
                if peer is None:
                    break
                sources.append(BlockSource(TierName.REMOTE, peer))
        return sources

    def start_load(
        self,
        blocks: Sequence[tuple[BlockHash, BlockSource, int]],
        timeout_s: float,
        trace: str = "",
    ) -> LoadTicket:
        """Begins to load blocks that `match` has found, in the order of the chain.

        blocks: (hash, source, device block). The ticket may be done at once; it is in the next
        `poll` all the same. trace: whose children the spans of fetches are.
        """
        return self._loader.start(blocks, timeout_s, trace)

    def cancel(self, ticket: LoadTicket) -> None:
        """Ends a ticket with nothing; `poll` does not return it. Idempotent."""
        self._loader.cancel(ticket)

    def poll(self) -> list[LoadTicket]:
        """Applies what has ended, starts what there is room for; returns tickets that are done."""
        for transfer in self._mover.take_ended():
            transfer.on_end(transfer)
        self._loader.expire()
        self._storer.pump()
        self._retry_disk()
        return self._loader.take_done()

    def take_returned_blocks(self) -> list[int]:
        """Device blocks that were busy and are the pool's again."""
        return self._loader.take_returned_blocks()

    def committed(self, block_hash: BlockHash, parent: BlockHash | None, block_id: int) -> None:
        """A device block has got its name, by computing or loading it."""
        self._storer.committed(block_hash, parent, block_id)

    def used(self, chain: list[BlockHash]) -> None:
        """A request was admitted with these blocks cached, on the device or below; head first."""
        for _, table in self._tables():
            table.touch(chain)
        self._storer.used(chain)

    def evicted(self, block_hash: BlockHash, block_id: int) -> None:
        """A device block has lost its name; called before anybody may write to it."""
        if self.lender is not None:
            self.lender.evicted(block_id)
        self._storer.evicted(block_hash, block_id)

    def cleared(self) -> None:
        """All device blocks have lost their names; called before anybody may write to them."""
        if self.lender is not None:
            self.lender.cleared()
        self._storer.cleared()

    def clear(self, tier: TierName) -> int:
        """Drops every block of the host or the disk tier; returns how many there were."""
        table = dict(self._tables()).get(tier)
        if table is None:
            return 0
        num_blocks = table.clear()
        attachment = None if self.disk is None else self.disk.attachment
        if tier is TierName.DISK and attachment is not None:
            attachment.begin_transfer()
            self._mover.start_load(
                attachment.clear_file(), lambda transfer: self._end_clear(attachment, transfer)
            )
        return num_blocks

    def holders(self, block_hash: BlockHash) -> list[TierName]:
        """Every tier that has the block, from fast to slow."""
        return [tier for tier, table in self._tables() if table.lookup(block_hash) is Lookup.HIT]

    def hold(self, names: Sequence[BlockHash]) -> None:
        """Keeps these blocks, in every tier where they are or will be, until `unhold`."""
        self._held.update(names)
        for _, table in self._tables():
            table.hold(names)

    def unhold(self, names: Sequence[BlockHash]) -> None:
        self._held.difference_update(names)
        for _, table in self._tables():
            table.unhold(names)

    def take_events(self) -> list[tuple[TierName, list[BlockEvent]]]:
        """What changed in each tier below the device since the last call, in order; tiers in which
        nothing changed are left out."""
        events: list[tuple[TierName, list[BlockEvent]]] = []
        if self.host is not None and (in_host := self.host.table.take_events()):
            events.append((TierName.HOST, in_host))
        if self.disk is not None and (on_disk := self.disk.take_events()):
            events.append((TierName.DISK, on_disk))
        return events

    def statistics(self) -> TiersStatistics:
        rates = self._loader.rates
        return TiersStatistics(
            tables={tier: table.statistics() for tier, table in self._tables()},
            block_bytes=self._device.block_bytes,
            blocks_loaded=dict(self._loader.blocks_loaded),
            blocks_stored={
                TierName.HOST: self._storer.counters.num_to_host,
                TierName.DISK: self._storer.counters.num_to_disk,
            },
            load_bytes={tier: rate.total_bytes for tier, rate in rates.items()},
            load_seconds={tier: rate.total_seconds for tier, rate in rates.items()},
            bytes_per_s={tier: rate.bytes_per_s for tier, rate in rates.items()},
            loads=replace(self._loader.counters),
            stores=replace(self._storer.counters),
            num_detachments=0 if self.disk is None else self.disk.num_detachments,
            victims_used_at={
                tier: used_at
                for tier, table in self._tables()
                if (used_at := table.next_victim_used_at()) is not None
            },
            peers=None if self.peers is None else replace(self.peers.book.counters),
            num_peers_avoided=0 if self.peers is None else self.peers.book.num_avoided,
            lent=None if self.lender is None else self.lender.snapshot(),
        )

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stores what is wanted below, makes the disk durable, and ends the threads.

        No ticket may be loading. After `timeout_s` what has not been begun stays undone, and a
        transfer that hangs is left behind, with its slot.
        """
        deadline = time.monotonic() + timeout_s
        if self.peers is not None:
            self.peers.client.close(timeout_s)
        self._storer.flush()
        self._storer.pump()
        while not self.is_idle and (left_s := deadline - time.monotonic()) > 0:
            for transfer in self._mover.take_ended(wait_s=left_s):
                transfer.on_end(transfer)
            self._storer.pump()
        self._mover.close(max(0.0, deadline - time.monotonic()))
        for transfer in self._mover.take_ended():
            transfer.on_end(transfer)
        if self.disk is not None:
            self.disk.close()

    def check_invariants(self) -> None:
        for _, table in self._tables():
            table.check_invariants()
        self._loader.check_invariants()
        self._storer.check_invariants()

    def _tables(self) -> list[tuple[TierName, SlotTable]]:
        """From fast to slow."""
        tables = []
        if self.host is not None:
            tables.append((TierName.HOST, self.host.table))
        if self.disk is not None and self.disk.table is not None:
            tables.append((TierName.DISK, self.disk.table))
        return tables

    def _is_slower(self, tier: TierName, block_compute_s: float | None) -> bool:
        bytes_per_s = self._loader.rates[tier].bytes_per_s
        if bytes_per_s is None or block_compute_s is None:
            return False
        return self._device.block_bytes > bytes_per_s * block_compute_s

    def _end_clear(self, attachment: Attachment, transfer: Transfer) -> None:
        attachment.end_transfer()
        if transfer.error is not None:
            assert self.disk is not None
            self.disk.detach(attachment, transfer.error)

    def _retry_disk(self) -> None:
        if self.disk is None or not self.disk.should_retry():
            return
        self._retries += 1
        attempt = _Attempt(self.disk)
        self._mover.start_load(attempt.run, lambda transfer: self._end_retry(attempt, transfer))

    def _end_retry(self, attempt: _Attempt, transfer: Transfer) -> None:
        self._retries -= 1
        assert self.disk is not None
        result = attempt.attachment or transfer.error
        assert result is not None
        self.disk.complete_retry(result)
        if self.disk.table is not None:
            self.disk.table.hold(self._held)


class _Attempt:
    """One attempt to attach the disk again, on a mover thread."""

    def __init__(self, disk: DiskTier) -> None:
        self._disk = disk
        self.attachment: Attachment | None = None

    def run(self) -> None:
        try:
            self.attachment = self._disk.open()
        except ConfigError as error:
            raise TierIOError(str(error)) from error
