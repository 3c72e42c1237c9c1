"""What an operator may ask of one worker's cache: lookup, clear, pin. Pure.

A pin holds the names of a prompt's full blocks for a time: wherever these blocks are, or come to be
while the pin lasts, they are not evicted. `clear` drops pinned blocks too; the pin goes on for when
they are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import TYPE_CHECKING

from xllm.cache.kv_cache import KVCache
from xllm.cache.tier import TierName
from xllm.cache.tiers import Tiers
from xllm.errors import InvalidRequest
from xllm.protocol import BlockHash

if TYPE_CHECKING:
    from xllm.cache.store_tier import StoreQuestion


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """The unbroken cached prefix of a prompt, in tokens."""

    matched_by_tier: dict[TierName, int]
    """Where a request would take its blocks from now: each from the fastest tier that has it."""
    held_by_tier: dict[TierName, int]
    """How much of it each tier has."""

    @property
    def num_matched(self) -> int:
        return sum(self.matched_by_tier.values())


class CacheAdmin:
    """For the engine's thread."""

    def __init__(
        self,
        kv_cache: KVCache,
        tiers: Tiers | None,
        *,
        max_pinned_blocks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_pinned_blocks`: so many that the device still has room to serve."""
        self._kv_cache = kv_cache
        self._tiers = tiers
        self._max_pinned_blocks = max_pinned_blocks
        self._clock = clock
        self._expiries: dict[BlockHash, float] = {}
        self._next_expiry = 0.0
        """Not after the first of them."""

    def lookup(self, token_ids: Sequence[int], salt: str) -> PrefixLookup:
        """What the cache has of a prompt; changes nothing."""
        return self.lookup_blocks(self._kv_cache.name_prompt(token_ids, salt))

    def lookup_blocks(self, names: Sequence[BlockHash]) -> PrefixLookup:
        """The same for a prompt whose full blocks have these names."""
        tiers = [TierName.DEVICE] + ([] if self._tiers is None else list(self._tiers.names))
        matched = dict.fromkeys(tiers, 0)
        held = dict.fromkeys(tiers, 0)
        for name in names:
            holders = self._holders(name)
            if not holders:
                break
            matched[holders[0]] += self._kv_cache.block_size
            for tier in holders:
                held[tier] += self._kv_cache.block_size
        return PrefixLookup(matched, held)

    def ask(self, names: Sequence[BlockHash]) -> StoreQuestion | None:
        """Finds out what the shared store has of a prompt's blocks beyond those known here: a
        lookup knows when the answer is not open any more. None: nothing to ask, or nobody."""
        rest = list(dropwhile(self._holders, names))
        return self._tiers.ask(rest) if rest and self._tiers is not None else None

    def clear(self, tier: TierName | None) -> dict[TierName, int]:
        """Drops the blocks of one tier, or of all; returns how many each had. The remote tier is
        the shared store, where they are dropped for all workers."""
        cleared: dict[TierName, int] = {}
        if tier in (None, TierName.DEVICE):
            cleared[TierName.DEVICE] = self._kv_cache.clear()
        for lower in () if self._tiers is None else self._tiers.names:
            if tier in (None, lower):
                assert self._tiers is not None
                cleared[lower] = self._tiers.clear(lower)
        return cleared

    def pin(self, token_ids: Sequence[int], salt: str, ttl_s: float) -> int:
        """Pins a prompt for `ttl_s`, or longer if it is pinned already; -> its full blocks.

        Raises: InvalidRequest if so many pinned blocks would not leave room to serve.
        """
        return self.pin_blocks(self._kv_cache.name_prompt(token_ids, salt), ttl_s)

    def pin_blocks(self, names: Sequence[BlockHash], ttl_s: float) -> int:
        """The same for a prompt whose full blocks have these names."""
        num_pinned = len(self._expiries.keys() | set(names))
        if num_pinned > self._max_pinned_blocks:
            raise InvalidRequest(
                f"{num_pinned} blocks would be pinned, of which this worker can have at most "
                f"{self._max_pinned_blocks}: its device has to hold a request of the greatest "
                "length besides"
            )
        expiry = self._clock() + ttl_s
        self._next_expiry = min(expiry, self._next_expiry) if self._expiries else expiry
        for name in names:
            self._expiries[name] = max(expiry, self._expiries.get(name, 0.0))
        self._kv_cache.pool.hold(names)
        if self._tiers is not None:
            self._tiers.hold(names)
        return len(names)

    def unpin(self, token_ids: Sequence[int], salt: str) -> int:
        """-> how many of its blocks were pinned."""
        return self.unpin_blocks(self._kv_cache.name_prompt(token_ids, salt))

    def unpin_blocks(self, names: Sequence[BlockHash]) -> int:
        """The same for a prompt whose full blocks have these names."""
        return self._release([name for name in names if name in self._expiries])

    def expire(self) -> None:
        """Ends the pins whose time is over: to be called before blocks are allocated."""
        if not self._expiries or (now := self._clock()) < self._next_expiry:
            return
        self._release([name for name, expiry in self._expiries.items() if expiry <= now])
        self._next_expiry = min(self._expiries.values(), default=0.0)

    def _release(self, names: list[BlockHash]) -> int:
        for name in names:
            del self._expiries[name]
        self._kv_cache.pool.unhold(names)
        if self._tiers is not None:
            self._tiers.unhold(names)
        return len(names)

    def _holders(self, name: BlockHash) -> list[TierName]:
        holders = [] if self._kv_cache.pool.lookup(name) is None else [TierName.DEVICE]
        return holders if self._tiers is None else holders + self._tiers.holders(name)
