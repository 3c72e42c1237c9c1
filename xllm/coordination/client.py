"""A client of etcd: every call has a deadline and moves to the next endpoint after a failure.

Only the generated messages of `etcd3aio` are used, over channels of our own: its calls have no
deadline, so one frozen member of three stalls them all.

A call that failed with `EtcdUnavailable` may still have been applied, and one that succeeded may
have been applied twice. Puts and deletes do not mind; whoever sends a txn has to recognise its
own earlier success by what it finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from etcd3aio import _protobuf as pb

from xllm.coordination.endpoints import Endpoint, open_channel, parse_endpoints
from xllm.coordination.errors import RequestTooLarge, from_grpc
from xllm.coordination.records import (
    Compare,
    CompareCreateRevision,
    CompareLease,
    Delete,
    DeleteRange,
    EtcdStatus,
    Get,
    KeyValue,
    Op,
    Put,
    Snapshot,
    TxnResult,
    prefix_end,
)
from xllm.errors import EtcdUnavailable

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 3 << 19
"""1.5 MiB: etcd's default for one request, with all the puts of a txn."""

PAGE_KEYS = 256
"""Keys per page of a range read."""

RETRY_DELAY_S = 0.1
"""Pause after every endpoint has failed once."""

_T = TypeVar("_T")


class _Member:
    """One endpoint and its channel, opened when first used."""

    __slots__ = ("_channel", "endpoint")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._channel: grpc.aio.Channel | None = None

    async def channel(self, timeout_s: float) -> grpc.aio.Channel:
        if self._channel is None:
            opened = await open_channel(self.endpoint, timeout_s)
            if self._channel is None:
                self._channel = opened
            else:  # another call was quicker
                await opened.close()
        return self._channel

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)


class EtcdClient:
    """All that xllm needs of etcd, over one or several endpoints of one cluster.

    `timeout_s` bounds each method, its retries on other endpoints included. All methods raise
    `EtcdUnavailable` when no endpoint answered in that time, and `EtcdRefused` for a request that
    etcd will not accept.
    """

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = 5.0) -> None:
        """Raises: ConfigError for an endpoint that is none."""
        self._members = [_Member(e) for e in parse_endpoints(",".join(endpoints))]
        self._current = 0
        self.timeout_s = timeout_s

    @property
    def addresses(self) -> str:
        """For people: where this client looks for etcd."""
        return ",".join(str(member.endpoint) for member in self._members)

    async def connect(self, wait_s: float) -> None:
        """Returns once etcd answers; says so in the log if that is not at once.

        Raises: EtcdUnavailable after `wait_s`.
        """
        deadline = asyncio.get_running_loop().time() + wait_s
        waiting = False
        while True:
            left_s = deadline - asyncio.get_running_loop().time()
            try:
                await self._call("KV", "Range", _one_key("/xllm/"), min(1.0, max(left_s, 0.05)))
            except EtcdUnavailable as error:
                if left_s <= 0:
                    raise EtcdUnavailable(
                        f"no etcd answered at {self.addresses} within {wait_s:g} s ({error}): "
                        "start one there, or say where it is with --etcd_addr"
                    ) from None
                if not waiting:
                    log.info("waiting for etcd addr=%s", self.addresses)
                    waiting = True
                await asyncio.sleep(min(RETRY_DELAY_S, left_s))
            else:
                if waiting:
                    log.info("etcd_found addr=%s", self.addresses)
                return

    async def close(self) -> None:
        for member in self._members:
            await member.close()

    # Keys

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        """The key as it is, or as it was at `revision`.

        Raises: Compacted.
        """
        request = _one_key(key)
        request.revision = revision
        response = await self._call("KV", "Range", request)
        return _key_value(response.kvs[0]) if response.kvs else None

    async def range(self, prefix: str) -> Snapshot:
        """All keys under `prefix` at one revision, read a page at a time."""
        kvs: list[KeyValue] = []
        request = pb.RangeRequest(
            key=prefix.encode(), range_end=prefix_end(prefix), limit=PAGE_KEYS
        )
        while True:
            response = await self._call("KV", "Range", request)
            kvs.extend(map(_key_value, response.kvs))
            if not request.revision:
                request.revision = response.header.revision
            if not response.more:
                return Snapshot(request.revision, tuple(kvs))
            request.key = response.kvs[-1].key + b"\0"

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """Returns the revision.

        Raises: RequestTooLarge, LeaseNotFound.
        """
        _check_size(key, value)
        request = pb.PutRequest(key=key.encode(), value=value, lease=lease_id)
        response = await self._call("KV", "Put", request)
        return int(response.header.revision)

    async def delete(self, key: str) -> bool:
        """Whether the key was there."""
        response = await self._call("KV", "DeleteRange", pb.DeleteRangeRequest(key=key.encode()))
        return bool(response.deleted)

    async def delete_prefix(self, prefix: str) -> int:
        """Returns how many keys were there."""
        request = pb.DeleteRangeRequest(key=prefix.encode(), range_end=prefix_end(prefix))
        response = await self._call("KV", "DeleteRange", request)
        return int(response.deleted)

    async def txn(
        self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Runs `success` if all compares hold, else `failure`, as one revision.

        Raises: RequestTooLarge, LeaseNotFound.
        """
        request = pb.TxnRequest(
            compare=[_compare(c) for c in compare],
            success=[_request_op(op) for op in success],
            failure=[_request_op(op) for op in failure],
        )
        size = request.ByteSize()
        if size > MAX_REQUEST_BYTES:
            raise RequestTooLarge(
                f"a transaction of {size} bytes: etcd takes {MAX_REQUEST_BYTES}; split it"
            )
        response = await self._call("KV", "Txn", request)
        gets = tuple(
            _key_value(r.response_range.kvs[0]) if r.response_range.kvs else None
            for r in response.responses
            if r.HasField("response_range")
        )
        return TxnResult(response.succeeded, response.header.revision, gets)

    # Leases

    async def grant(self, lease_id: int, ttl_s: int) -> int:
        """Returns the TTL in seconds, which etcd may have raised.

        Raises: LeaseExists, also when an attempt whose answer was lost made it.
        """
        request = pb.LeaseGrantRequest(ID=lease_id, TTL=ttl_s)
        response = await self._call("Lease", "LeaseGrant", request)
        return int(response.TTL)

    async def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """Deletes the lease's keys with it.

        Raises: LeaseNotFound.
        """
        await self._call("Lease", "LeaseRevoke", pb.LeaseRevokeRequest(ID=lease_id), timeout_s)

    async def keep_alive(self, lease_id: int, *, attempt_s: float, timeout_s: float) -> int:
        """Returns the seconds from now that the lease will live; 0: it is gone."""

        async def once(channel: grpc.aio.Channel, attempt_s: float) -> int:
            call = pb.LeaseStub(channel).LeaseKeepAlive(
                iter((pb.LeaseKeepAliveRequest(ID=lease_id),)), timeout=attempt_s
            )
            response = await call.read()
            if not isinstance(response, pb.LeaseKeepAliveResponse):  # end of the stream
                raise EtcdUnavailable("etcd ended the keepalive without an answer")
            call.cancel()
            return max(0, int(response.TTL))

        return await self._try_members(once, timeout_s, attempt_s)

    async def time_to_live(self, lease_id: int) -> int:
        """Seconds that the lease has left; -1: it does not exist."""
        request = pb.LeaseTimeToLiveRequest(ID=lease_id)
        response = await self._call("Lease", "LeaseTimeToLive", request)
        return int(response.TTL)

    # Maintenance

    async def compact(self, revision: int) -> None:
        """Forgets what was before `revision`.

        Raises: Compacted if it is forgotten already.
        """
        await self._call("KV", "Compact", pb.CompactionRequest(revision=revision))

    async def status(self) -> EtcdStatus:
        """Of the member that answers."""
        response = await self._call("Maintenance", "Status", pb.StatusRequest())
        return EtcdStatus(
            version=response.version,
            revision=response.header.revision,
            db_size_bytes=response.dbSize,
            db_size_in_use_bytes=response.dbSizeInUse,
            has_leader=bool(response.leader),
            no_space=any("NOSPACE" in error for error in response.errors),
        )

    # Calls

    @asynccontextmanager
    async def watch_call(self) -> AsyncIterator[Any]:
        """An open Watch stream on the current member, cancelled on leaving the block.

        An error inside the block that speaks against the member makes the next one current.
        Raises: EtcdUnavailable, EtcdRefused.
        """
        index = self._current
        member = self._members[index]
        try:
            channel = await member.channel(self.timeout_s)
            # Else a member that has lost the majority would keep silent for ever.
            call = pb.WatchStub(channel).Watch(metadata=(("hasleader", "true"),))
            try:
                yield call
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            await self._give_up_on(index)
            raise from_grpc(error, str(member.endpoint)) from None
        except EtcdUnavailable:
            await self._give_up_on(index)
            raise

    async def _call(
        self, service: str, method: str, request: Any, timeout_s: float | None = None
    ) -> Any:
        stub_type = getattr(pb, f"{service}Stub")

        async def once(channel: grpc.aio.Channel, attempt_s: float) -> Any:
            return await getattr(stub_type(channel), method)(request, timeout=attempt_s)

        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return await self._try_members(once, timeout_s, timeout_s / len(self._members))

    async def _try_members(
        self,
        once: Callable[[grpc.aio.Channel, float], Awaitable[_T]],
        timeout_s: float,
        attempt_s: float,
    ) -> _T:
        """Calls `once` on one member after the other until one answers or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        failures = 0
        while True:
            index = self._current
            member = self._members[index]
            try:
                left_s = min(attempt_s, deadline - loop.time())
                return await once(await member.channel(left_s), left_s)
            except grpc.aio.AioRpcError as error:
                failure = from_grpc(error, str(member.endpoint))
            except EtcdUnavailable as error:
                failure = error
            if not isinstance(failure, EtcdUnavailable):
                raise failure
            await self._give_up_on(index)
            failures += 1
            delay_s = RETRY_DELAY_S if failures % len(self._members) == 0 else 0.0
            if loop.time() + delay_s >= deadline:
                raise failure
            await asyncio.sleep(delay_s)

    async def _give_up_on(self, index: int) -> None:
        """Makes the next member current, unless a call that failed earlier did so already."""
        if self._current == index:
            self._current = (index + 1) % len(self._members)


def _one_key(key: str) -> Any:
    return pb.RangeRequest(key=key.encode())


def _check_size(key: str, value: bytes) -> None:
    if len(key) + len(value) > MAX_REQUEST_BYTES:
        raise RequestTooLarge(
            f"{key} with {len(value)} bytes: etcd takes {MAX_REQUEST_BYTES} per request"
        )


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _compare(compare: Compare) -> Any:
    key = compare.key.encode()
    equal = pb.Compare.EQUAL
    if isinstance(compare, CompareLease):
        return pb.Compare(key=key, result=equal, target=pb.Compare.LEASE, lease=compare.lease_id)
    if isinstance(compare, CompareCreateRevision):
        return pb.Compare(
            key=key, result=equal, target=pb.Compare.CREATE, create_revision=compare.revision
        )
    return pb.Compare(key=key, result=equal, target=pb.Compare.MOD, mod_revision=compare.revision)


def _request_op(op: Op) -> Any:
    if isinstance(op, Put):
        put = pb.PutRequest(key=op.key.encode(), value=op.value, lease=op.lease_id)
        return pb.RequestOp(request_put=put)
    if isinstance(op, Get):
        return pb.RequestOp(request_range=_one_key(op.key))
    if isinstance(op, Delete):
        delete = pb.DeleteRangeRequest(key=op.key.encode())
    else:
        assert isinstance(op, DeleteRange)
        delete = pb.DeleteRangeRequest(key=op.first.encode(), range_end=op.end.encode())
    return pb.RequestOp(request_delete_range=delete)
