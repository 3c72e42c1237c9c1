"""Blocks fetched from peers ahead of requests: moved by an operator, or wanted by many. Pure.

A prefetch brings the part of a chain that is not here in any tier, up to the first block that is
here again, that nobody has, or that somebody is bringing already. Its blocks are promised while
they are on their way, so that a request that wants them waits instead of computing them, and are
ordinary cached blocks afterwards. It takes at most half of the device's free blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from xllm.cache.block_pool import BlockPool
from xllm.cache.kv_contract import LowerTiers
from xllm.cache.tier import TierName
from xllm.protocol import BlockHash, FetchRange

if TYPE_CHECKING:
    from xllm.cache.loads import LoadTicket


@dataclass(frozen=True, slots=True)
class PrefetchOutcome:
    """Of the chain that was asked for, in blocks."""

    num_held: int
    """Leading ones that are here now, or promised."""
    num_fetched: int


@dataclass(slots=True)
class _Prefetch:
    chain: Sequence[BlockHash]
    start: int
    """Index of the first block that is fetched."""
    block_ids: list[int]
    on_end: Callable[[PrefetchOutcome], None]

    @property
    def names(self) -> Sequence[BlockHash]:
        return self.chain[self.start : self.start + len(self.block_ids)]


class Prefetcher:
    """For the engine's thread."""

    def __init__(self, pool: BlockPool, tiers: LowerTiers, pending: set[BlockHash]) -> None:
        """`pending`: what is promised, by everybody; shared with the cache."""
        self._pool = pool
        self._tiers = tiers
        self._pending = pending
        self._running: dict[LoadTicket, _Prefetch] = {}

    def start(
        self,
        chain: Sequence[BlockHash],
        fetch: Sequence[FetchRange],
        timeout_s: float,
        on_end: Callable[[PrefetchOutcome], None],
    ) -> None:
        """`on_end` is called once, now if there is nothing to fetch.

        chain: names from the first block of a prompt on; fetch: who has which of them.
        """
        start = self._num_held(chain)
        absent = list(takewhile(lambda name: not self._is_held(name), chain[start:]))
        sources = self._tiers.match(absent, None, fetch, start)
        sources = list(takewhile(lambda source: source.tier is TierName.REMOTE, sources))
        sources = sources[: self._pool.num_free // 2]
        block_ids = self._pool.allocate(len(sources))
        if not sources or block_ids is None:
            on_end(PrefetchOutcome(start, 0))
            return
        prefetch = _Prefetch(chain, start, block_ids, on_end)
        self._pending.update(prefetch.names)
        blocks = list(zip(prefetch.names, sources, block_ids, strict=True))
        self._running[self._tiers.start_load(blocks, timeout_s)] = prefetch

    def end(self, ticket: LoadTicket) -> set[int]:
        """Names what a done ticket has brought; returns the blocks that are still written to.

        A ticket that is not a prefetch's, or was cancelled, is passed over.
        """
        prefetch = self._running.pop(ticket, None)
        if prefetch is None:
            return set()
        names, block_ids = prefetch.names, prefetch.block_ids
        busy = set(ticket.busy_block_ids)
        self._pending.difference_update(names)
        for i in range(ticket.num_arrived):
            if self._pool.commit(block_ids[i], names[i]):
                index = prefetch.start + i
                parent = prefetch.chain[index - 1] if index else None
                self._tiers.committed(names[i], parent, block_ids[i])
        self._pool.release([block_id for block_id in block_ids if block_id not in busy])
        prefetch.on_end(PrefetchOutcome(self._num_held(prefetch.chain), ticket.num_arrived))
        return busy

    def cancel(self) -> set[int]:
        """Ends all, with nothing; returns the blocks that are still written to."""
        busy: set[int] = set()
        for ticket in list(self._running):
            self._tiers.cancel(ticket)
            busy |= self.end(ticket)
        return busy

    @property
    def block_ids(self) -> list[int]:
        return [block_id for prefetch in self._running.values() for block_id in prefetch.block_ids]

    @property
    def pending_hashes(self) -> list[BlockHash]:
        return [name for prefetch in self._running.values() for name in prefetch.names]

    def _num_held(self, chain: Sequence[BlockHash]) -> int:
        return sum(1 for _ in takewhile(self._is_held, chain))

    def _is_held(self, name: BlockHash) -> bool:
        if self._pool.lookup(name) is not None or name in self._pending:
            return True
        sources = self._tiers.match([name])
        return bool(sources) and sources[0].tier is not TierName.REMOTE
