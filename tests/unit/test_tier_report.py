"""Metrics and status of the tiers."""

from __future__ import annotations

from dataclasses import replace

from xllm.cache.loads import LoadCounters
from xllm.cache.store_tier import StoreTierCounters, StoreTierStatistics
from xllm.cache.store_transfers import StoreCounters
from xllm.cache.tier import TableStatistics, TierName
from xllm.cache.tiers import TiersStatistics
from xllm.engine.statistics import EngineStatistics
from xllm.roles.tier_report import block_observers, collect_tiers, tiers_status
from xllm.telemetry import Metrics

NO_TABLE = TableStatistics(10, 0, 0, 0, 0, 0, 0, 0)
BEFORE = TiersStatistics(
    tables={TierName.HOST: NO_TABLE, TierName.DISK: NO_TABLE},
    block_bytes=100,
    blocks_loaded={TierName.HOST: 0, TierName.DISK: 0},
    blocks_stored={TierName.HOST: 0, TierName.DISK: 0},
    load_bytes={TierName.HOST: 0, TierName.DISK: 0},
    load_seconds={TierName.HOST: 0.0, TierName.DISK: 0.0},
    bytes_per_s={TierName.HOST: None, TierName.DISK: None},
    loads=LoadCounters(),
    stores=StoreCounters(),
    num_detachments=0,
)
NOW = replace(
    BEFORE,
    tables={TierName.HOST: replace(NO_TABLE, num_ready=5, num_evictions=2)},
    blocks_loaded={TierName.HOST: 3, TierName.DISK: 4},
    blocks_stored={TierName.HOST: 7, TierName.DISK: 8},
    load_bytes={TierName.HOST: 300, TierName.DISK: 400},
    load_seconds={TierName.HOST: 0.5, TierName.DISK: 1.5},
    loads=LoadCounters(num_timeouts=1, num_corrupt=2),
    stores=StoreCounters(num_dropped=1, num_torn=1, copy_seconds=0.25, write_seconds=0.75),
    num_detachments=1,
)


def test_metrics_follow_the_tiers_and_count_once() -> None:
    metrics = Metrics()
    first = EngineStatistics(num_blocks=20, tiers=BEFORE)
    now = EngineStatistics(
        num_blocks=20,
        num_used_blocks=3,
        num_cached_blocks=4,
        num_evictions=6,
        hit_tokens_by_tier={TierName.DEVICE: 32, TierName.DISK: 64},
        tiers=NOW,
    )
    for before, after in ((EngineStatistics(), first), (first, now), (now, now)):
        collect_tiers(metrics, before, after)
    rendered = metrics.render().decode()
    for line in (
        'xllm_tier_blocks{tier="device"} 20.0',
        'xllm_tier_blocks_used{tier="device"} 7.0',
        'xllm_tier_evictions_total{tier="device"} 6.0',
        'xllm_tier_blocks{tier="host"} 10.0',
        'xllm_tier_blocks_used{tier="host"} 5.0',
        'xllm_tier_blocks{tier="disk"} 0.0',
        'xllm_tier_hits_total{tier="disk"} 64.0',
        'xllm_tier_promotions_total{tier="disk"} 4.0',
        'xllm_tier_demotions_total{tier="host"} 7.0',
        'xllm_tier_evictions_total{tier="host"} 2.0',
        'xllm_tier_transfer_bytes_total{transfer="from_disk"} 400.0',
        'xllm_tier_transfer_seconds_total{transfer="from_disk"} 1.5',
        'xllm_tier_transfer_bytes_total{transfer="to_host"} 700.0',
        'xllm_tier_transfer_seconds_total{transfer="to_disk"} 0.75',
        "xllm_tier_load_timeouts_total 1.0",
        "xllm_tier_checksum_failures_total 2.0",
        "xllm_tier_stores_dropped_total 2.0",
        "xllm_tier_detachments_total 1.0",
    ):
        assert f"\n{line}\n" in rendered


def test_histograms_have_their_tier() -> None:
    metrics = Metrics()
    observers = block_observers(metrics)
    observers[TierName.DEVICE].block_reused(3.0)
    observers[TierName.DISK].block_evicted(100.0, 20.0)
    rendered = metrics.render().decode()
    assert 'xllm_kv_block_reuse_gap_seconds_sum{tier="device"} 3.0' in rendered
    assert 'xllm_kv_block_lifetime_seconds_sum{tier="disk"} 100.0' in rendered
    assert 'xllm_kv_block_idle_before_evict_seconds_sum{tier="disk"} 20.0' in rendered


def test_status() -> None:
    assert tiers_status(EngineStatistics(), EngineStatistics()) == ""
    before, now = EngineStatistics(tiers=BEFORE), EngineStatistics(tiers=NOW)
    assert tiers_status(before, now) == " host_usage=50% host_loaded=3 host_stored=7"


STORE = StoreTierStatistics(
    is_attached=True,
    num_known=9,
    num_detachments=1,
    counters=StoreTierCounters(
        num_asks=5,
        ask_seconds=0.5,
        num_unanswered=1,
        num_loaded=2,
        num_stored=3,
        put_seconds=0.25,
        num_full=4,
        num_absent=6,
        num_corrupt=7,
        num_failed=8,
    ),
    load_bytes=200,
    load_seconds=0.5,
    bytes_per_s=None,
)


def test_metrics_and_status_of_the_shared_store() -> None:
    metrics = Metrics()
    now = EngineStatistics(tiers=replace(NOW, store=STORE))
    for before in (EngineStatistics(), now):
        collect_tiers(metrics, before, now)
    rendered = metrics.render().decode()
    for line in (
        "xllm_store_attached 1.0",
        "xllm_store_known_blocks 9.0",
        "xllm_store_detachments_total 1.0",
        "xllm_store_asks_total 5.0",
        "xllm_store_ask_seconds_total 0.5",
        *(
            f'xllm_store_failures_total{{reason="{reason}"}} {count}.0'
            for reason, count in (
                *(("unanswered", 1), ("full", 4), ("absent", 6), ("corrupt", 7), ("failed", 8)),
            )
        ),
        'xllm_tier_promotions_total{tier="remote"} 2.0',
        'xllm_tier_demotions_total{tier="remote"} 3.0',
        'xllm_tier_transfer_bytes_total{transfer="from_store"} 200.0',
        'xllm_tier_transfer_bytes_total{transfer="to_store"} 300.0',
    ):
        assert f"\n{line}\n" in rendered
    status = tiers_status(EngineStatistics(), now)
    assert status.endswith(" store_loaded=2 store_stored=3")


def test_a_block_of_the_store_costs_what_was_measured() -> None:
    assert STORE.block_s(100) == 0.25
    assert replace(STORE, bytes_per_s=1e6).block_s(100) == 1e-4
    assert replace(STORE, is_attached=False).block_s(100) is None
