"""How the leader divides the cluster's budget for writes to etcd among the workers. Pure.

    budget = load reports + base shares + extra

Each worker gets an equal base out of one half of what the load reports leave. The other half goes
to the workers that want more, in equal parts, or to all if none does. So a worker that was silent
can speak at once, and one that was just filled from a disk is not held up by silent ones.

A worker wants more from when it has many blocks to tell of until it has few: two marks, or the
leader would change its mind with each report.

Load reports become rarer in clusters so large that they would take more than half of the puts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xllm.cache.upload_budget import LOAD_REPORT_BYTES, MIN_BYTES_PER_S, MIN_PUTS_PER_S
from xllm.config import IndexConfig
from xllm.protocol import LeaderWord, MasterId, UploadShare, WorkerId

LOAD_PERIOD_S = 1.0
WANTS_MORE_BLOCKS = 2048
HAS_ENOUGH_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Need:
    """One worker's."""

    num_blocks: int
    """That it holds, in all tiers."""
    num_pending: int
    """Of which the index has yet to be told."""


def divide(
    config: IndexConfig,
    master_id: MasterId,
    needs: Mapping[WorkerId, Need],
    before: LeaderWord | None = None,
) -> LeaderWord:
    """What the leader has to say to these workers."""
    num_workers = max(1, len(needs))
    period_s = max(LOAD_PERIOD_S, 2.0 * num_workers / config.max_upload_puts_per_s)
    reports_per_s = num_workers / period_s
    puts = config.max_upload_puts_per_s - reports_per_s
    num_bytes = max(0.0, config.max_upload_bytes_per_s - reports_per_s * LOAD_REPORT_BYTES)
    wanted_before = before.wanting if before is not None else []
    wanting = sorted(
        worker_id
        for worker_id, need in needs.items()
        if need.num_pending
        >= (HAS_ENOUGH_BLOCKS if worker_id in wanted_before else WANTS_MORE_BLOCKS)
    )
    if len(wanting) == len(needs):
        wanting = []
    level = _level([need.num_blocks for need in needs.values()], config.max_index_blocks)
    base = 0.5 if wanting else 1.0
    part = base / num_workers
    extra = (1.0 - base) / len(wanting) if wanting else 0.0
    return LeaderWord(
        master_id=master_id,
        share=_share(puts * part, num_bytes * part, level),
        wanting=wanting,
        wanting_share=_share(puts * (part + extra), num_bytes * (part + extra), level)
        if wanting
        else None,
        load_period_s=round(period_s, 2),
    )


def _share(puts_per_s: float, bytes_per_s: float, max_blocks: int) -> UploadShare:
    return UploadShare(
        puts_per_s=round(max(MIN_PUTS_PER_S, puts_per_s), 2),
        bytes_per_s=round(max(MIN_BYTES_PER_S, bytes_per_s)),
        max_blocks=max_blocks,
    )


def _level(num_blocks: list[int], room: int) -> int:
    """The most that each may publish so that all fit: what small ones leave is for large ones.

    0: all of them fit.
    """
    if sum(num_blocks) <= room:
        return 0
    left = room
    ordered = sorted(num_blocks)
    for index, size in enumerate(ordered):
        even = left // (len(ordered) - index)
        if size >= even:
            # In steps, or each block that somebody stores would be a new word of the leader.
            return max(1, even - even % max(1, even // 20))
        left -= size
    raise AssertionError("the sizes add up to more than there is room for")
