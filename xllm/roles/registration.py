"""Workers that may serve one model together: they agree on weights, dtype and block size.

Workers with one model_id share the names of blocks, so a request may move between them. The first
one to register sets what the others must have. A worker checks this before it registers, and once
more after, because two may register at the same time: the one whose key is older stays. Masters
check it too, for workers that do not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from xllm.cache.block_hash import CacheRoot
from xllm.coordination import KeyValue
from xllm.protocol import MasterInfo, WorkerId, WorkerInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """What workers of one model have in common, and who set it."""

    root: CacheRoot
    first: WorkerId

    @classmethod
    def of(cls, info: WorkerInfo) -> CacheGroup:
        return cls(cache_root(info), info.worker_id)

    def refusal(self, info: WorkerInfo) -> str:
        """Why `info` cannot join; empty if it can."""
        model_id = info.model.model_id
        root = self.root
        if info.fingerprint != root.fingerprint:
            return (
                f"worker {self.first} serves model_id {model_id} with other weights "
                f"({root.fingerprint[:8]}, not {info.fingerprint[:8]}): "
                "give one of the models another --model_id"
            )
        if info.block_size != root.block_size:
            return (
                f"worker {self.first} serves model_id {model_id} with "
                f"--block_size={root.block_size}, not {info.block_size}: use the same"
            )
        if info.kv_dtype != root.kv_dtype:
            return (
                f"worker {self.first} serves model_id {model_id} with "
                f"--dtype={root.kv_dtype}, not {info.kv_dtype}: use the same"
            )
        return ""


def cache_root(info: WorkerInfo) -> CacheRoot:
    """What a worker's names of blocks begin with: `Engine.root`."""
    return CacheRoot(
        fingerprint=info.fingerprint, kv_dtype=info.kv_dtype, block_size=info.block_size
    )


def decode_worker(kv: KeyValue) -> WorkerInfo | None:
    """None, and a line in the log, for a value that is no registration."""
    if not kv.value:
        return None
    try:
        return msgspec.json.decode(kv.value, type=WorkerInfo)
    except msgspec.MsgspecError as error:
        logger.warning("bad_registration key=%s error=%r", kv.key, str(error))
        return None


def decode_master(kv: KeyValue) -> MasterInfo | None:
    """None, and a line in the log, for a value that is no registration."""
    if not kv.value:
        return None
    try:
        return msgspec.json.decode(kv.value, type=MasterInfo)
    except msgspec.MsgspecError as error:
        logger.warning("bad_registration key=%s error=%r", kv.key, str(error))
        return None


def find_conflict(info: WorkerInfo, registered: Iterable[KeyValue]) -> str:
    """Why `info` cannot serve beside those in `workers/`; empty if it can.

    If its own key is among them, only older ones count.
    """
    others: list[tuple[int, WorkerInfo]] = []
    own_revision = None
    for kv in registered:
        other = decode_worker(kv)
        if other is None or other.model.model_id != info.model.model_id:
            continue
        if other.worker_id == info.worker_id:
            own_revision = kv.create_revision
        else:
            others.append((kv.create_revision, other))
    if own_revision is not None:
        others = [item for item in others if item[0] < own_revision]
    if not others:
        return ""
    _, first = min(others, key=lambda item: item[0])
    return CacheGroup.of(first).refusal(info)
