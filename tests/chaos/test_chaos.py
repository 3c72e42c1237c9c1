"""Short schedules of faults under load; `scripts/chaos --minutes N` runs long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.harness import chaos

THREE_MEMBERS = (
    "kill_worker+freeze_etcd_member",
    "split",
    "freeze_worker",
    "stop_worker+lose_clients",
    "lose_lease",
    "kill_master",
    "drain_worker+kill_etcd_member",
)
ONE_MEMBER = ("restart_etcd", "kill_worker", "wipe_etcd")


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nothing_is_lost_with_three_etcd_members(tmp_path: Path) -> None:
    async with chaos(
        tmp_path, num_members=3, num_workers=3, num_masters=2, seed=1, etcd_pause_s=8.0
    ) as run:
        await run.run(THREE_MEMBERS)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_nothing_is_lost_with_one_etcd_member(tmp_path: Path) -> None:
    async with chaos(
        tmp_path, num_members=1, num_workers=2, num_masters=1, seed=2, etcd_pause_s=8.0
    ) as run:
        await run.run(ONE_MEMBER)
