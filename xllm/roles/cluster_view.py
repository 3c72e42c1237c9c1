"""The whole cluster for people, as one master sees it: the answer of GET /admin/cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from xllm.cache.event_codec import TierCode
from xllm.cache.index import CacheIndex
from xllm.coordination import EtcdStatus
from xllm.protocol import LeaderWord, MasterInfo, WorkerId, WorkerLoad
from xllm.roles.registry import Member, Registry
from xllm.roles.stream_client import WorkerStream
from xllm.roles.upload_shares import Need


def upload_needs(registry: Registry[WorkerStream]) -> dict[WorkerId, Need]:
    """What the leader has to know of the workers that are registered, to divide the budget."""
    needs = {}
    for member in registry:
        if member.registered:
            load = registry.load_of(member.info.worker_id)
            num_blocks = sum(usage.used for usage in load.tiers.values()) if load else 0
            num_pending = load.index_pending_blocks if load else 0
            needs[member.info.worker_id] = Need(num_blocks, num_pending)
    return needs


def describe_workers(
    registry: Registry[WorkerStream], index: CacheIndex, word: LeaderWord | None
) -> list[dict[str, Any]]:
    """Ordered by id."""
    members = sorted(registry, key=lambda member: member.info.worker_id)
    return [
        _describe_worker(member, registry.load_of(member.info.worker_id), index, word)
        for member in members
    ]


def describe_masters(masters: Sequence[MasterInfo], leader: str | None) -> list[dict[str, Any]]:
    """Ordered by id."""
    return [
        msgspec.to_builtins(master) | {"is_leader": master.master_id == leader}
        for master in sorted(masters, key=lambda master: master.master_id)
    ]


def describe_etcd(status: EtcdStatus | None, quota_bytes: int, alive: bool) -> dict[str, Any]:
    """`alive`: this master's lease is."""
    described: dict[str, Any] = {"connected": alive}
    if status is not None:
        described |= {
            "version": status.version,
            "revision": status.revision,
            "size_bytes": status.db_size_bytes,
            "in_use_bytes": status.db_size_in_use_bytes,
            "quota_bytes": quota_bytes,
            "is_full": status.no_space,
        }
    return described


def _describe_worker(
    member: Member[WorkerStream],
    load: WorkerLoad | None,
    index: CacheIndex,
    word: LeaderWord | None,
) -> dict[str, Any]:
    info = member.info
    share = None if word is None else word.share_of(info.worker_id)
    described: dict[str, Any] = {
        "worker_id": info.worker_id,
        "state": member.state.value,
        "model": info.model.model_id,
        "fingerprint": info.fingerprint,
        "epoch": f"{info.epoch:016x}",
        "address": info.address,
        "operator_address": info.operator_address,
        "block_address": info.block_address,
        "block_size": info.block_size,
        "block_bytes": info.block_bytes,
        "kv_dtype": info.kv_dtype,
        "started_at": info.started_at,
        "tiers": _describe_tiers(info.worker_id, load, index),
        "load": None,
        "upload_share": None if share is None else msgspec.to_builtins(share),
    }
    if member.refusal:
        described["refusal"] = member.refusal
    if load is not None:
        described["load"] = {
            "waiting_requests": load.waiting_requests_num,
            "running_requests": load.running_requests_num,
            "waiting_tokens": load.waiting_tokens_num,
            "queue_s": load.queue_s,
            "cache_usage": load.gpu_cache_usage_perc,
            "prefill_tokens_per_s": load.prefill_tokens_per_s,
            "decode_step_s": load.decode_step_s,
            "index_pending_blocks": load.index_pending_blocks,
            "moved_blocks": load.moved_blocks,
        }
    return described


def _describe_tiers(
    worker_id: WorkerId, load: WorkerLoad | None, index: CacheIndex
) -> dict[str, dict[str, Any]]:
    """By tier: what the worker says it holds, and how much of that this master knows."""
    tiers: dict[str, dict[str, Any]] = {}
    if load is not None:
        for tier, usage in load.tiers.items():
            tiers[tier] = {
                "used_blocks": usage.used,
                "total_blocks": usage.total,
                "block_s": load.tier_block_s.get(tier),
                "eviction_age_s": load.eviction_age_s.get(tier),
            }
    for tier_code, num_held in zip(TierCode, index.num_held(worker_id), strict=True):
        name = tier_code.name.lower()
        if num_held or name in tiers:
            tiers.setdefault(name, {})["indexed_blocks"] = num_held
    return tiers
