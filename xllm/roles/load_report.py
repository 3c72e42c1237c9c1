"""What a worker says of its load in etcd: one snapshot of its engine, rounded. Pure.

Numbers are rounded so far that a report of an idle worker seldom differs from the one before: only
what has changed is written.
"""

from __future__ import annotations

import math

from xllm.cache.tier import TierName
from xllm.engine.statistics import EngineStatistics
from xllm.protocol import PEER, Epoch, PrefillCost, TierUsage, Watermark, WorkerLoad


def make_load(
    now: EngineStatistics,
    epoch: Epoch,
    watermarks: dict[str, Watermark],
    time_s: float,
    index_pending_blocks: int = 0,
) -> WorkerLoad:
    """`time_s`: by `time.monotonic`, on whose clock `now` has moments."""
    return WorkerLoad(
        epoch=epoch,
        waiting_requests_num=now.num_waiting,
        running_requests_num=now.num_running,
        waiting_tokens_num=now.waiting_tokens,
        gpu_cache_usage_perc=round(now.cache_usage, 4),
        prefill_tokens_per_s=round(now.prefill_tokens_per_s, 1),
        decode_step_s=round(now.decode_step_s, 5),
        queue_s=round(now.queue_s, 4),
        prefill_cost=_rounded(now.prefill_cost),
        tier_block_s=_tier_block_s(now),
        eviction_age_s=_eviction_age_s(now, time_s),
        tiers=tier_usage(now),
        moved_blocks=moved_blocks(now),
        index_pending_blocks=index_pending_blocks,
        watermarks=watermarks,
    )


def tier_usage(now: EngineStatistics) -> dict[str, TierUsage]:
    """From fast to slow."""
    usage = {
        TierName.DEVICE.value: TierUsage(
            now.num_used_blocks + now.num_cached_blocks, now.num_blocks
        )
    }
    if now.tiers is not None:
        for tier, table in now.tiers.tables.items():
            usage[tier.value] = TierUsage(table.num_ready, table.num_slots)
    return usage


def moved_blocks(now: EngineStatistics) -> dict[str, int]:
    """`WorkerLoad.moved_blocks`."""
    if now.tiers is None:
        return {}
    moved = {}
    for tier, num_blocks in now.tiers.blocks_loaded.items():
        moved[f"from_{PEER if tier is TierName.REMOTE else tier.value}"] = num_blocks
    for tier, num_blocks in now.tiers.blocks_stored.items():
        moved[f"to_{tier.value}"] = num_blocks
    if now.tiers.lent is not None:
        moved[f"to_{PEER}"] = sum(now.tiers.lent.served.values())
    return {way: num_blocks for way, num_blocks in moved.items() if num_blocks}


def significant(value: float, num_digits: int) -> float:
    """Rounded to so many significant digits."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, num_digits - 1 - math.floor(math.log10(abs(value))))


def _rounded(cost: PrefillCost | None) -> PrefillCost | None:
    if cost is None:
        return None
    return PrefillCost(*(significant(x, 4) for x in (cost.step_s, cost.token_s, cost.pair_s)))


def _tier_block_s(now: EngineStatistics) -> dict[str, float]:
    if now.tiers is None:
        return {}
    measured = {tier.value: now.tiers.block_s(tier) for tier in now.tiers.tables}
    measured[PEER] = now.tiers.peer_block_s
    if now.tiers.store is not None:
        measured[TierName.REMOTE.value] = now.tiers.store.block_s(now.tiers.block_bytes)
    return {tier: significant(block_s, 3) for tier, block_s in measured.items() if block_s}


def _eviction_age_s(now: EngineStatistics, time_s: float) -> dict[str, float]:
    used_at: dict[TierName, float] = {}
    if now.victim_used_at is not None:
        used_at[TierName.DEVICE] = now.victim_used_at
    if now.tiers is not None:
        used_at |= now.tiers.victims_used_at
    return {tier.value: significant(max(0.0, time_s - at), 2) for tier, at in used_at.items()}
