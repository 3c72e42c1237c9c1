"""What is measured reaches the report that routers reckon with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_tier_report import NOW as TIERS

from xllm.cache.lender import LendCounters
from xllm.cache.store_transfers import StoreCounters
from xllm.cache.tier import TierName
from xllm.engine.statistics import EngineStatistics
from xllm.protocol import Epoch, PrefillCost, TierUsage, WorkerLoad
from xllm.roles.load_report import make_load, significant

HOST, DISK = TierName.HOST, TierName.DISK
TABLES = {HOST: TIERS.tables[HOST], DISK: replace(TIERS.tables[HOST], num_ready=9)}


def load_of(**fields: object) -> WorkerLoad:
    statistics = EngineStatistics(num_blocks=20, num_used_blocks=3, num_cached_blocks=4, **fields)  # type: ignore[arg-type]
    return make_load(statistics, Epoch(1), {}, 1000.0, 17)


def test_everything_that_was_measured() -> None:
    tiers = replace(TIERS, tables=TABLES, victims_used_at={HOST: 876.5})
    load = load_of(
        prefill_cost=PrefillCost(0.0123456, 0.000712345, 1.23456e-8),
        queue_s=1.234567,
        victim_used_at=989.96,
        tiers=tiers,
    )
    assert load.prefill_cost == PrefillCost(0.01235, 0.0007123, 1.235e-8)
    assert load.queue_s == 1.2346
    assert load.eviction_age_s == {"device": 10.0, "host": 120.0}
    assert load.tiers == {
        "device": TierUsage(7, 20),
        "host": TierUsage(5, 10),
        "disk": TierUsage(9, 10),
    }
    assert load.index_pending_blocks == 17


def test_a_block_costs_what_the_latest_loads_took() -> None:
    tiers = replace(TIERS, tables=TABLES, bytes_per_s={HOST: 1e6, DISK: 5e5})
    assert load_of(tiers=tiers).tier_block_s == {"host": 1e-4, "disk": 2e-4}


def test_without_late_loads_it_costs_what_all_of_them_took() -> None:
    tiers = replace(TIERS, tables=TABLES)
    # 300 bytes in 0.5 s, 400 bytes in 1.5 s, 100 bytes a block
    assert load_of(tiers=tiers).tier_block_s == {"host": 0.167, "disk": 0.375}


def test_before_any_load_it_costs_what_the_stores_took() -> None:
    tiers = replace(TIERS, tables=TABLES, load_bytes={HOST: 0, DISK: 0})
    # 7 blocks in 0.25 s, 8 blocks in 0.75 s
    assert load_of(tiers=tiers).tier_block_s == {"host": 0.0357, "disk": 0.0938}


def test_a_tier_that_never_held_anything_has_no_cost() -> None:
    tiers = replace(
        TIERS,
        tables=TABLES,
        load_bytes={HOST: 0, DISK: 0},
        blocks_stored={HOST: 0, DISK: 0},
        stores=StoreCounters(),
    )
    assert load_of(tiers=tiers).tier_block_s == {}


def test_how_many_blocks_moved_which_way() -> None:
    loaded = {HOST: 3, DISK: 0, TierName.REMOTE: 5}
    lent = LendCounters({TierName.DEVICE: 2, HOST: 4, DISK: 0})
    tiers = replace(TIERS, blocks_loaded=loaded, blocks_stored={HOST: 7, DISK: 8}, lent=lent)
    assert load_of(tiers=tiers).moved_blocks == {
        "from_host": 3,
        "from_peer": 5,
        "to_host": 7,
        "to_disk": 8,
        "to_peer": 6,
    }
    assert load_of().moved_blocks == {}


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.0, 0.0), (123456.0, 120000.0), (0.0456, 0.046), (-9.99, -10.0)]
)
def test_significant_digits(value: float, rounded: float) -> None:
    assert significant(value, 2) == rounded
