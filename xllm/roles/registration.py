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
from xllm.net import split_host_port
from xllm.protocol import (
    PROTOCOL_VERSION,
    MasterInfo,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
    decode_json,
)

logger = logging.getLogger(__name__)

_MAX_REPORTED = 2.0**63
"""An epoch has 63 bits; nothing that is measured comes near."""
_MIN_REPORTED = 1e-30


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


def version_refusal(info: WorkerInfo) -> str:
    """Why a master of this version cannot talk to the worker; empty if it can."""
    if info.protocol_version == PROTOCOL_VERSION:
        return ""
    return (
        f"protocol version {info.protocol_version} of the worker is not {PROTOCOL_VERSION} of this "
        "master: it needs a master of its own version"
    )


def cache_root(info: WorkerInfo) -> CacheRoot:
    """What a worker's names of blocks begin with: `Engine.root`."""
    return CacheRoot(
        fingerprint=info.fingerprint, kv_dtype=info.kv_dtype, block_size=info.block_size
    )


def decode_worker(kv: KeyValue) -> WorkerInfo | None:
    """None, and a line in the log, for a value that is no registration.

    Fields that this version does not know are passed over: they are a later one's.
    """
    if not kv.value:
        return None
    try:
        info = decode_json(kv.value, WorkerInfo)
        _check_worker(kv, info)
    except ValueError as error:
        logger.warning("bad_registration key=%s error=%r", kv.key, str(error))
        return None
    return info


def decode_load(kv: KeyValue) -> WorkerLoad | None:
    """None, and a line in the log, for a value that is no load report."""
    try:
        load = decode_json(kv.value, WorkerLoad)
        _check_numbers(msgspec.to_builtins(load))
    except ValueError as error:
        logger.warning("bad_load key=%s error=%r", kv.key, str(error))
        return None
    return load


def _check_numbers(value: object) -> None:
    """Products of a few of them have to be finite, and each has to be sayable in msgpack.

    Raises: ValueError.
    """
    match value:
        case dict():
            for item in value.values():
                _check_numbers(item)
        case list() | tuple():
            for item in value:
                _check_numbers(item)
        case float() | int():
            if not -_MAX_REPORTED <= value <= _MAX_REPORTED or 0 < abs(value) < _MIN_REPORTED:
                raise ValueError(f"{value} is no number of ours")


def _check_worker(kv: KeyValue, info: WorkerInfo) -> None:
    """What masters take for granted. Raises: ValueError."""
    if kv.key.rpartition("/")[2] != info.worker_id:
        raise ValueError(f"worker_id is {info.worker_id!r}")
    _check_numbers(msgspec.to_builtins(info))
    split_host_port(info.address)
    for name in ("block_size", "device_blocks", "block_bytes"):
        if getattr(info, name) < 1:
            raise ValueError(f"{name} is {getattr(info, name)}")
    if min(info.model.max_model_len, info.model.vocab_size) < 1:
        raise ValueError(f"no model has {info.model}")


def decode_master(kv: KeyValue) -> MasterInfo | None:
    """None, and a line in the log, for a value that is no registration."""
    if not kv.value:
        return None
    try:
        return decode_json(kv.value, MasterInfo)
    except ValueError as error:
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
