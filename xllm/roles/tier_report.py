"""What a worker says of its tiers: metrics, and their part of the status line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING

from prometheus_client import Counter

from xllm.cache.store_tier import StoreTierStatistics
from xllm.cache.tier import TierName
from xllm.cache.tiers import TiersStatistics
from xllm.telemetry import Metrics

if TYPE_CHECKING:
    from xllm.engine.statistics import EngineStatistics

LOCAL_TIERS = (TierName.DEVICE, TierName.HOST, TierName.DISK)


class BlockMetrics:
    """Feeds the histograms of one tier, on the engine's thread: a `BlockObserver`."""

    def __init__(self, metrics: Metrics, tier: TierName) -> None:
        self._reuse_gap = metrics.kv_block_reuse_gap_seconds.labels(tier)
        self._lifetime = metrics.kv_block_lifetime_seconds.labels(tier)
        self._idle = metrics.kv_block_idle_before_evict_seconds.labels(tier)

    def block_reused(self, gap_s: float) -> None:
        self._reuse_gap.observe(gap_s)

    def block_evicted(self, lifetime_s: float, idle_s: float) -> None:
        self._lifetime.observe(lifetime_s)
        self._idle.observe(idle_s)


def block_observers(metrics: Metrics) -> dict[TierName, BlockMetrics]:
    return {tier: BlockMetrics(metrics, tier) for tier in LOCAL_TIERS}


def collect_tiers(metrics: Metrics, before: EngineStatistics, now: EngineStatistics) -> None:
    """Brings the tiers' metrics from one snapshot of the engine to the next."""
    metrics.tier_blocks.labels(TierName.DEVICE).set(now.num_blocks)
    metrics.tier_blocks_used.labels(TierName.DEVICE).set(
        now.num_used_blocks + now.num_cached_blocks
    )
    metrics.tier_evictions.labels(TierName.DEVICE).inc(now.num_evictions - before.num_evictions)
    # A prompt asks the next tier for what those before it did not have.
    num_asked = now.queried_tokens - before.queried_tokens
    for tier in TierName:
        hits = now.hit_tokens_by_tier.get(tier, 0) - before.hit_tokens_by_tier.get(tier, 0)
        if hits or _has(now, tier):
            metrics.tier_queries.labels(tier).inc(num_asked)
            metrics.tier_hits.labels(tier).inc(hits)
            num_asked = max(0, num_asked - hits)
    if now.tiers is not None:
        _collect_lower(metrics, before.tiers, now.tiers)


def _has(statistics: EngineStatistics, tier: TierName) -> bool:
    """Prompts look there now."""
    if tier is TierName.DEVICE:
        return True
    tiers = statistics.tiers
    if tier is TierName.REMOTE:
        has_store = tiers is not None and tiers.store is not None and tiers.store.is_attached
        return tiers is not None and (tiers.peers is not None or has_store)
    return tiers is not None and tier in tiers.tables


def tiers_status(before: EngineStatistics, now: EngineStatistics) -> str:
    """` host=80% disk=12%`: how full the tiers are, with what went there; empty without tiers."""
    if now.tiers is None:
        return ""
    text = ""
    for tier, table in now.tiers.tables.items():
        loaded = now.tiers.blocks_loaded[tier]
        stored = now.tiers.blocks_stored[tier]
        if before.tiers is not None:
            loaded -= before.tiers.blocks_loaded[tier]
            stored -= before.tiers.blocks_stored[tier]
        usage = table.num_ready / table.num_slots
        text += f" {tier}_usage={usage:.0%} {tier}_loaded={loaded} {tier}_stored={stored}"
    if now.tiers.peers is not None:
        text += f" peers_loaded={_loaded_from_peers(now) - _loaded_from_peers(before)}"
    if now.tiers.store is not None:
        counted = now.tiers.store.counters
        loaded, stored = counted.num_loaded, counted.num_stored
        if before.tiers is not None and before.tiers.store is not None:
            loaded -= before.tiers.store.counters.num_loaded
            stored -= before.tiers.store.counters.num_stored
        text += f" store_loaded={loaded} store_stored={stored}"
    return text


def _loaded_from_peers(statistics: EngineStatistics) -> int:
    return 0 if statistics.tiers is None else statistics.tiers.blocks_loaded[TierName.REMOTE]


def _collect_lower(metrics: Metrics, before: TiersStatistics | None, now: TiersStatistics) -> None:
    for tier in (TierName.HOST, TierName.DISK):
        table = now.tables.get(tier)
        metrics.tier_blocks.labels(tier).set(0 if table is None else table.num_slots)
        metrics.tier_blocks_used.labels(tier).set(0 if table is None else table.num_ready)
    metrics.peers_avoided.set(now.num_peers_avoided)
    if now.store is not None:
        metrics.store_attached.set(now.store.is_attached)
        metrics.store_known_blocks.set(now.store.num_known)
    counted: Iterable[float] = (
        repeat(0.0) if before is None else (value for _, value in _counts(metrics, before))
    )
    for (counter, value), old in zip(_counts(metrics, now), counted, strict=False):
        # A disk that was detached comes back with books that begin at 0.
        counter.inc(max(0.0, value - old))


def _counts(metrics: Metrics, tiers: TiersStatistics) -> Iterator[tuple[Counter, float]]:
    """Every counter with its value in a snapshot, always in the same order."""
    for tier in (TierName.HOST, TierName.DISK):
        table = tiers.tables.get(tier)
        yield metrics.tier_promotions.labels(tier), tiers.blocks_loaded[tier]
        yield metrics.tier_demotions.labels(tier), tiers.blocks_stored[tier]
        yield metrics.tier_evictions.labels(tier), 0 if table is None else table.num_evictions
        transfer = f"from_{tier}"
        yield metrics.tier_transfer_bytes.labels(transfer), tiers.load_bytes[tier]
        yield metrics.tier_transfer_seconds.labels(transfer), tiers.load_seconds[tier]
        transfer = f"to_{tier}"
        num_bytes = tiers.blocks_stored[tier] * tiers.block_bytes
        yield metrics.tier_transfer_bytes.labels(transfer), num_bytes
    yield metrics.tier_transfer_seconds.labels("to_host"), tiers.stores.copy_seconds
    yield metrics.tier_transfer_seconds.labels("to_disk"), tiers.stores.write_seconds
    yield metrics.tier_load_timeouts, tiers.loads.num_timeouts
    yield metrics.tier_checksum_failures, tiers.loads.num_corrupt
    yield metrics.tier_stores_dropped, tiers.stores.num_dropped + tiers.stores.num_torn
    yield metrics.tier_detachments, tiers.num_detachments
    if tiers.peers is not None:
        yield metrics.tier_promotions.labels(TierName.REMOTE), tiers.blocks_loaded[TierName.REMOTE]
        transfer = f"from_{TierName.REMOTE}"
        yield metrics.tier_transfer_bytes.labels(transfer), tiers.load_bytes[TierName.REMOTE]
        yield metrics.tier_transfer_seconds.labels(transfer), tiers.load_seconds[TierName.REMOTE]
        yield metrics.peer_failures, tiers.peers.num_failures
        yield metrics.peer_blocks_absent, tiers.peers.num_absent
        yield metrics.peer_blocks_corrupt, tiers.peers.num_corrupt
    if tiers.store is not None:
        yield from _store_counts(metrics, tiers, tiers.store)
    if tiers.lent is not None:
        for tier, num_blocks in tiers.lent.served.items():
            yield metrics.peer_served_blocks.labels(tier), num_blocks
            yield metrics.peer_served_bytes.labels(tier), num_blocks * tiers.block_bytes
        yield metrics.peer_serve_misses, tiers.lent.num_missed


def _store_counts(
    metrics: Metrics, tiers: TiersStatistics, store: StoreTierStatistics
) -> Iterator[tuple[Counter, float]]:
    counted = store.counters
    yield metrics.tier_promotions.labels(TierName.REMOTE), counted.num_loaded
    yield metrics.tier_demotions.labels(TierName.REMOTE), counted.num_stored
    yield metrics.tier_transfer_bytes.labels("from_store"), store.load_bytes
    yield metrics.tier_transfer_seconds.labels("from_store"), store.load_seconds
    yield metrics.tier_transfer_bytes.labels("to_store"), counted.num_stored * tiers.block_bytes
    yield metrics.tier_transfer_seconds.labels("to_store"), counted.put_seconds
    yield metrics.store_asks, counted.num_asks
    yield metrics.store_ask_seconds, counted.ask_seconds
    yield metrics.store_detachments, store.num_detachments
    misses = metrics.store_failures.labels
    yield misses("unanswered"), counted.num_unanswered
    yield misses("absent"), counted.num_absent
    yield misses("corrupt"), counted.num_corrupt
    yield misses("full"), counted.num_full
    yield misses("failed"), counted.num_failed
