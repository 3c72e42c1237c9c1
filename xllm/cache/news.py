"""What changed in a worker's tiers since it was last asked: for the index of the cluster. Pure.

The tiers keep events until somebody takes them. The engine does so after each step, whether anybody
wants to know or not, so that they do not pile up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xllm.cache.block_pool import BlockEvent
from xllm.cache.kv_cache import KVCache
from xllm.cache.tier import TierName
from xllm.cache.tiers import Tiers
from xllm.protocol import BlockHash


@dataclass(frozen=True, slots=True)
class CacheNews:
    """Handed from the engine's thread to another: nobody changes it any more."""

    changes: list[tuple[TierName, list[BlockEvent]]]
    """By tier, in the order in which they happened."""
    used: list[list[BlockHash]] = field(default_factory=list)
    """For each prompt that was admitted, its blocks that were found in some tier."""


class NewsCollector:
    """`take` is for the engine's thread, `tell` for that of the listener."""

    def __init__(self, kv_cache: KVCache, tiers: Tiers | None) -> None:
        self.listener: Callable[[CacheNews], None] | None = None
        """To be set before the engine starts; hears first what the tiers held from the start."""
        self._pool = kv_cache.pool
        self._tiers = tiers
        self._used: list[list[BlockHash]] = []
        kv_cache.on_used = self._used.append

    def take(self) -> CacheNews | None:
        """None: nothing has happened, or nobody listens."""
        changes: list[tuple[TierName, list[BlockEvent]]] = []
        if on_device := self._pool.take_events():
            changes.append((TierName.DEVICE, on_device))
        if self._tiers is not None:
            changes += self._tiers.take_events()
        if not changes and not self._used:
            return None
        used = self._used.copy()
        self._used.clear()
        return None if self.listener is None else CacheNews(changes, used)

    def tell(self, news: CacheNews | None) -> None:
        if news is not None and self.listener is not None:
            self.listener(news)
