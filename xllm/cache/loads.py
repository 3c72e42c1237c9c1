"""Blocks on their way up to the device for requests that wait for them.

    start ──> QUEUED ──a mover thread takes it──> RUNNING ──> ARRIVED (verified) or FAILED
                 └───────────cancelled──────────> FAILED

A request can use only an unbroken prefix, so a ticket has a limit: the index of the first block
that will not arrive. It begins at the number of blocks, and falls when a transfer fails, the
deadline passes or the request is cancelled; queued transfers at or above it are taken back. The
ticket is done when every block below the limit has arrived.

A transfer that runs cannot be stopped. When its ticket is done without it, its device blocks are
*busy*: they belong to the loader until the transfer has ended, and `take_returned_blocks` gives
them back. The pins on its source slots stay as long.

Pure bookkeeping for the engine's thread; bytes move on the mover's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from xllm.cache.disk_tier import DiskTier
from xllm.cache.host_tier import DeviceBlocks, HostTier
from xllm.cache.load_runs import LoadRun, LocalRun, PeerRun
from xllm.cache.mover import Mover, Transfer, TransferGroup
from xllm.cache.peer_fetch import Peer
from xllm.cache.peers import Peers
from xllm.cache.rates import TransferRate
from xllm.cache.store_tier import StoreTier
from xllm.cache.tier import LOWER_TIERS, TierName
from xllm.protocol import BlockHash


class BlockSource(NamedTuple):
    """Where a block is loaded from."""

    tier: TierName
    peer: Peer | None = None
    """Of the remote tier; None: the shared store."""


IN_STORE = BlockSource(TierName.REMOTE)


class LoadSpan(NamedTuple):
    """What one tier brought for one ticket, and when, by the loader's clock."""

    tier: TierName
    started_at: float
    ended_at: float
    num_blocks: int


@dataclass(slots=True)
class _Item:
    """One block of a ticket."""

    hash: BlockHash
    block_id: int
    source: BlockSource
    arrived: bool = False
    under_way: bool = False
    """Its transfer is queued or running."""


class LoadTicket:
    """What one request waits for. Read by the scheduler, changed by `Loader` only."""

    __slots__ = (
        "_items",
        "_runs",
        "deadline",
        "is_done",
        "is_seen",
        "limit",
        "num_arrived",
        "spans",
        "started_at",
        "trace",
    )

    def __init__(
        self, items: list[_Item], started_at: float, deadline: float, trace: str = ""
    ) -> None:
        self.trace = trace
        self._items = items
        self._runs: list[_Run] = []
        self.started_at = started_at
        self.deadline = deadline
        self.limit = len(items)
        self.num_arrived = 0
        """Leading blocks whose bytes are on the device and verified."""
        self.is_done = False
        self.spans: list[LoadSpan] = []
        """One for each tier, when it is done."""
        self.is_seen = False
        """Its owner knows that it is done, and so which of its blocks are busy."""

    @property
    def tiers(self) -> list[TierName]:
        """Where the blocks that have arrived came from."""
        return [item.source.tier for item in self._items[: self.num_arrived]]

    @property
    def busy_block_ids(self) -> list[int]:
        """Device blocks that a transfer still writes to: when the ticket is done, they are not the
        request's any more. To be read as soon as `poll` or `cancel` returns."""
        return [item.block_id for item in self._items if item.under_way]


@dataclass(slots=True, eq=False)
class _Run:
    """Items [start, stop) of a ticket: one transfer from one source."""

    ticket: LoadTicket
    start: int
    stop: int
    source: BlockSource
    blocks: LoadRun
    transfer: Transfer | None = None
    ended_at: float | None = None

    @property
    def items(self) -> list[_Item]:
        return self.ticket._items[self.start : self.stop]


@dataclass(slots=True)
class LoadCounters:
    """Since the start."""

    num_tickets: int = 0
    num_timeouts: int = 0
    """Loads whose deadline passed."""
    num_cancelled: int = 0
    num_corrupt: int = 0
    """Blocks whose checksum did not hold."""
    num_failed_transfers: int = 0


class Loader:
    """Tickets and the transfers that fill them."""

    def __init__(
        self,
        device: DeviceBlocks,
        mover: Mover,
        host: HostTier | None,
        disk: DiskTier | None,
        clock: Callable[[], float],
        peers: Peers | None = None,
        store: StoreTier | None = None,
    ) -> None:
        self.counters = LoadCounters()
        self.rates = {tier: TransferRate(clock) for tier in LOWER_TIERS}
        """Of the remote tier: peers; the store has its own."""
        self.blocks_loaded = dict.fromkeys(LOWER_TIERS, 0)
        self._device = device
        self._mover = mover
        self._host = host
        self._disk = disk
        self._peers = peers
        self._store = store
        self._clock = clock
        self._loading: dict[LoadTicket, None] = {}
        self._num_running = 0
        """Runs whose transfer has not ended, of done tickets too."""
        self._done: list[LoadTicket] = []
        self._returned: list[int] = []

    @property
    def is_idle(self) -> bool:
        """No transfer is queued or running."""
        return self._num_running == 0

    @property
    def next_deadline(self) -> float | None:
        """When `poll` has to be called although nothing has ended."""
        return min((ticket.deadline for ticket in self._loading), default=None)

    def start(
        self,
        blocks: Sequence[tuple[BlockHash, BlockSource, int]],
        timeout_s: float,
        trace: str = "",
    ) -> LoadTicket:
        """Pins blocks where they are and queues their transfers.

        blocks: (hash, source, device block that takes it), in the order of the chain. The device
        blocks stay with the caller, who neither frees nor uses them until the ticket is done.
        A block that is not there any more ends the ticket's prefix.
        """
        now = self._clock()
        items = [_Item(block_hash, block_id, source) for block_hash, source, block_id in blocks]
        ticket = LoadTicket(items, now, now + timeout_s, trace)
        self.counters.num_tickets += 1
        self._loading[ticket] = None
        self._pin(ticket)
        group = TransferGroup()
        for run in ticket._runs:
            for item in run.items:
                item.under_way = True
            block_ids = [item.block_id for item in run.items]
            run.transfer = run.blocks.start(
                block_ids, ticket.deadline, partial(self._end, run), group
            )
            self._num_running += 1
        self._settle(ticket)
        return ticket

    def cancel(self, ticket: LoadTicket) -> None:
        """The request does not want its blocks any more: the ticket is done at once, with none."""
        if ticket.is_seen:
            return
        self.counters.num_cancelled += 1
        if ticket.is_done:
            self._done.remove(ticket)
        else:
            self._lower(ticket, 0)
            self._finish(ticket)
        ticket.num_arrived = 0
        ticket.is_seen = True

    def expire(self) -> None:
        """Ends the tickets whose deadline has passed: with what has arrived."""
        now = self._clock()
        for ticket in [ticket for ticket in self._loading if ticket.deadline <= now]:
            self.counters.num_timeouts += 1
            self._lower(ticket, ticket.num_arrived)
            self._settle(ticket)

    def take_done(self) -> list[LoadTicket]:
        """Tickets done since the last call, but for cancelled ones."""
        done, self._done = self._done, []
        for ticket in done:
            ticket.is_seen = True
        return done

    def take_returned_blocks(self) -> list[int]:
        """Device blocks that were busy when their ticket was done, and are not any more."""
        returned, self._returned = self._returned, []
        return returned

    def check_invariants(self) -> None:
        num_running = 0
        for ticket in self._loading:
            assert not ticket.is_done
            assert ticket.num_arrived < ticket.limit
            assert all(item.arrived for item in ticket._items[: ticket.num_arrived])
            num_running += any(item.under_way for item in ticket._items)
        assert num_running <= self._num_running

    def _pin(self, ticket: LoadTicket) -> None:
        """Cuts the ticket into runs: neighbours from one tier."""
        run: _Run | None = None
        for i, item in enumerate(ticket._items):
            is_open = (
                run is not None
                and run.source == item.source
                and i - run.start < run.blocks.max_blocks
            )
            if not is_open or run is None:
                blocks = self._open_run(item.source, ticket.trace)
                run = None if blocks is None else _Run(ticket, i, i, item.source, blocks)
            if run is None or not run.blocks.try_add(item.hash):
                self._lower(ticket, i)
                return
            if run.start == i:
                ticket._runs.append(run)
            run.stop = i + 1

    def _open_run(self, source: BlockSource, trace: str) -> LoadRun | None:
        """None: the source has gone."""
        device, mover = self._device, self._mover
        if source.tier is TierName.HOST and self._host is not None:
            return LocalRun(device, mover, self._host.table, self._host, None)
        if source.tier is TierName.DISK and self._disk is not None:
            attachment = self._disk.attachment
            if attachment is not None:
                return LocalRun(device, mover, attachment.table, self._disk, attachment)
        if source.peer is not None and self._peers is not None:
            return PeerRun(self._peers.client, self._peers.book, mover, source.peer, trace)
        if source == IN_STORE and self._store is not None:
            return self._store.open_run()
        return None

    def _end(self, run: _Run, transfer: Transfer) -> None:
        self._num_running -= 1
        run.transfer = None
        run.ended_at = self._clock()
        ticket = run.ticket
        self.counters.num_failed_transfers += transfer.error is not None
        sound, num_corrupt = run.blocks.end(transfer)
        self.counters.num_corrupt += num_corrupt
        for item, is_sound in zip(run.items, sound, strict=True):
            item.under_way = False
            item.arrived = is_sound
            if ticket.is_seen:
                self._returned.append(item.block_id)
        if not ticket.is_done:
            if False in sound:
                self._lower(ticket, run.start + sound.index(False))
            self._settle(ticket)

    def _lower(self, ticket: LoadTicket, limit: int) -> None:
        """Nothing at or above `limit` is wanted any more."""
        ticket.limit = min(ticket.limit, limit)
        for run in ticket._runs:
            transfer = run.transfer
            if run.start < ticket.limit or transfer is None:
                continue
            if self._mover.try_cancel(transfer):
                self._num_running -= 1
                run.transfer = None
                for item in run.items:
                    item.under_way = False
                run.blocks.abandon()

    def _settle(self, ticket: LoadTicket) -> None:
        """Moves the ticket's prefix on, and ends the ticket if it has reached the limit."""
        items = ticket._items
        while ticket.num_arrived < ticket.limit and items[ticket.num_arrived].arrived:
            ticket.num_arrived += 1
        if ticket.num_arrived == ticket.limit:
            self._finish(ticket)
            self._done.append(ticket)
            self._measure(ticket)

    def _finish(self, ticket: LoadTicket) -> None:
        ticket.num_arrived = ticket.limit
        ticket.is_done = True
        del self._loading[ticket]

    def _measure(self, ticket: LoadTicket) -> None:
        """One observation for each tier: what it brought, until its last transfer ended. Peers are
        one, and the store is another."""
        now = self._clock()
        by_medium: dict[tuple[TierName, bool], list[_Run]] = {}
        for run in ticket._runs:
            medium = (run.source.tier, run.source == IN_STORE)
            by_medium.setdefault(medium, []).append(run)
        for (tier, is_store), runs in by_medium.items():
            num_blocks = sum(item.arrived for run in runs for item in run.items)
            ended_at = max(now if run.ended_at is None else run.ended_at for run in runs)
            ticket.spans.append(LoadSpan(tier, ticket.started_at, ended_at, num_blocks))
            num_bytes = num_blocks * self._device.block_bytes
            if is_store and self._store is not None:
                self._store.counters.num_loaded += num_blocks
                self._store.rate.observe(num_bytes, ended_at - ticket.started_at)
                continue
            self.blocks_loaded[tier] += num_blocks
            self.rates[tier].observe(num_bytes, ended_at - ticket.started_at)
            peers = {run.source.peer for run in runs if run.source.peer is not None}
            if len(peers) == 1 and num_bytes and self._peers is not None:
                self._peers.book.delivered(peers.pop(), num_bytes, ended_at - ticket.started_at)
