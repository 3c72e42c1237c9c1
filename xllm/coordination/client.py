"""A client of etcd: every call has a deadline and moves to the next endpoint after a failure.

Only the generated messages of `etcd3aio` are used, over channels of our own: its calls have no
deadline, so one frozen member of three stalls them all.

A call that failed with `EtcdUnavailable` may still have been applied, and one that succeeded may
have been applied twice. Puts and deletes do not mind; whoever sends a txn has to recognise its
own earlier success by what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from etcd3aio import _protobuf as pb

from xllm.config import DEFAULT_ETCD_ADDR, EtcdConfig
from xllm.coordination import wire
from xllm.coordination.access import EtcdAccess, Metadata
from xllm.coordination.endpoints import Endpoint, parse_endpoints, resolve
from xllm.coordination.errors import (
    Compacted,
    EtcdNoSpace,
    EtcdRefused,
    RequestTooLarge,
    from_grpc,
)
from xllm.coordination.records import (
    Change,
    Compare,
    EtcdStatus,
    KeyValue,
    Op,
    Put,
    Snapshot,
    TxnResult,
    prefix_end,
)
from xllm.errors import ConfigError, EtcdUnavailable
from xllm.security.seal import Seal

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 3 << 19
"""1.5 MiB: etcd's default for one request, with all the puts of a txn."""

PAGE_KEYS = 40
"""Per page of a range read: so many of the largest requests fit one response."""

DEFRAGMENT_TIMEOUT_S = 60.0
"""It copies the whole file."""

RETRY_DELAY_S = 0.1
"""Pause after every endpoint has failed once."""

RESOLVE_AGAIN_S = 2.0
"""The least time between two look-ups of one name."""

_T = TypeVar("_T")


class _Member:
    """One endpoint and its channel, opened when first used.

    After a failure, the name is looked up again: a server may come back under another address.
    A channel that was replaced stays open until the client is closed, because closing it would
    cancel the calls of other tasks that are still on it.
    """

    __slots__ = ("_access", "_channels", "_resolved_at", "_target", "endpoint", "suspect")

    def __init__(self, endpoint: Endpoint, access: EtcdAccess) -> None:
        self.endpoint = endpoint
        self._access = access
        self.suspect = True
        """A call failed since the name was resolved."""
        self._target: str | None = None
        self._resolved_at = -math.inf
        self._channels: list[grpc.aio.Channel] = []

    async def channel(self, timeout_s: float) -> grpc.aio.Channel:
        """Raises: EtcdUnavailable if the host's name never could be resolved."""
        now = asyncio.get_running_loop().time()
        if self.suspect and now - self._resolved_at > RESOLVE_AGAIN_S:
            try:
                target = await resolve(self.endpoint, timeout_s)
            except EtcdUnavailable:
                if self._target is None:
                    raise
            else:
                self.suspect = False
                if target != self._target:
                    self._target = target
                    self._channels.append(self._access.open_channel(self.endpoint, target))
            self._resolved_at = now
        return self._channels[-1]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)


class EtcdClient:
    """All that xllm needs of etcd, over one or several endpoints of one cluster.

    `timeout_s` bounds each method, its retries on other endpoints included. All methods raise
    `EtcdUnavailable` when no endpoint answered in that time, and `EtcdRefused` for a request that
    etcd will not accept.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        timeout_s: float = 5.0,
        access: EtcdAccess | None = None,
        seal: Seal | None = None,
    ) -> None:
        """`seal`: what records are proven with.

        Raises: ConfigError for an endpoint that is none.
        """
        self._access = access or EtcdAccess()
        self._seal = seal or Seal(None)
        self._members = [_Member(e, self._access) for e in parse_endpoints(",".join(endpoints))]
        self._current = 0
        self.timeout_s = timeout_s

    @classmethod
    def of(cls, config: EtcdConfig, seal: Seal | None = None) -> EtcdClient:
        """Raises: ConfigError."""
        address = config.etcd_addr or DEFAULT_ETCD_ADDR
        return cls([address], access=EtcdAccess.of(config), seal=seal)

    @property
    def addresses(self) -> str:
        """For people: where this client looks for etcd."""
        return ",".join(str(member.endpoint) for member in self._members)

    @property
    def urls(self) -> list[str]:
        endpoints = [member.endpoint for member in self._members]
        return [f"{'https' if e.tls else 'http'}://{e}" for e in endpoints]

    async def connect(self, wait_s: float) -> None:
        """Returns once etcd answers; says so in the log if that is not at once.

        Raises: EtcdUnavailable after `wait_s`; ConfigError if what answers does not let us in.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        waiting = False
        while True:
            left_s = deadline - loop.time()
            try:
                await self.ping(max(0.1, min(1.0, left_s)))
            except EtcdUnavailable as error:
                if left_s <= 0:
                    raise EtcdUnavailable(
                        f"no etcd answered at {self.addresses} within {wait_s:g} s ({error}): "
                        "start one there, or say where it is with --etcd_addr"
                    ) from None
                if not waiting:
                    log.info("waiting for etcd addr=%s", self.addresses)
                    waiting = True
            except EtcdRefused as error:
                raise ConfigError(
                    f"{error}: expected an etcd 3.4 or newer, that lets us in: without"
                    " authentication, or with a right --etcd_user and password for /xllm/"
                ) from None
            else:
                if waiting:
                    log.info("etcd_found addr=%s", self.addresses)
                return

    async def ping(self, timeout_s: float) -> None:
        """Raises: EtcdUnavailable if etcd cannot answer a read in that time."""
        await self._call("KV", "Range", wire.one_key("/xllm/"), timeout_s)

    async def close(self) -> None:
        """Ends calls that are still running with CancelledError: end their tasks first."""
        for member in self._members:
            await member.close()

    # Keys

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        """The key as it is, or as it was at `revision`.

        Raises: Compacted.
        """
        response = await self._call("KV", "Range", wire.one_key(key, revision))
        return self._opened(wire.key_value(response.kvs[0])) if response.kvs else None

    async def range(self, prefix: str) -> Snapshot:
        """All keys under `prefix` at one revision, read a page at a time."""
        while True:
            with contextlib.suppress(Compacted):  # between two pages: start over
                return await self._range_once(prefix)

    async def _range_once(self, prefix: str) -> Snapshot:
        kvs: list[KeyValue] = []
        request = pb.RangeRequest(
            key=prefix.encode(), range_end=prefix_end(prefix), limit=PAGE_KEYS
        )
        while True:
            response = await self._call("KV", "Range", request)
            kvs.extend(self._opened(wire.key_value(kv)) for kv in response.kvs)
            if not request.revision:
                request.revision = response.header.revision
            if not response.more:
                return Snapshot(request.revision, tuple(kvs))
            request.key = response.kvs[-1].key + b"\0"

    async def is_empty(self, prefix: str, *, revision: int = 0) -> bool:
        """Whether there is, or was at `revision`, no key under `prefix`.

        Raises: Compacted; EtcdRefused for a revision that is yet to come.
        """
        request = pb.RangeRequest(
            key=prefix.encode(), range_end=prefix_end(prefix), revision=revision, count_only=True
        )
        return bool((await self._call("KV", "Range", request)).count == 0)

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """Returns the revision.

        Raises: RequestTooLarge, LeaseNotFound.
        """
        value = self._seal.close(key, value, lease_id)
        if len(key) + len(value) > MAX_REQUEST_BYTES:
            raise RequestTooLarge(
                f"{key} with {len(value)} bytes: etcd takes {MAX_REQUEST_BYTES} per request"
            )
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
            compare=[wire.compare(c) for c in compare],
            success=[wire.request_op(self._closed(op)) for op in success],
            failure=[wire.request_op(self._closed(op)) for op in failure],
        )
        size = request.ByteSize()
        if size > MAX_REQUEST_BYTES:
            raise RequestTooLarge(
                f"a transaction of {size} bytes: etcd takes {MAX_REQUEST_BYTES}; split it"
            )
        response = await self._call("KV", "Txn", request)
        gets = tuple(
            self._opened(wire.key_value(r.response_range.kvs[0])) if r.response_range.kvs else None
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

        async def once(channel: grpc.aio.Channel, attempt_s: float, metadata: Metadata) -> int:
            call = pb.LeaseStub(channel).LeaseKeepAlive(
                iter((pb.LeaseKeepAliveRequest(ID=lease_id),)), timeout=attempt_s, metadata=metadata
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
            is_leader=response.leader == response.header.member_id,
            quota_bytes=response.dbSizeQuota,
            no_space=any("NOSPACE" in error for error in response.errors),
        )

    async def make_room(self, revision: int) -> None:
        """Forgets what was before `revision`, gives back its space, and lets a full etcd be
        written to again. The member that answers stands still meanwhile."""
        compaction = pb.CompactionRequest(revision=revision, physical=True)
        with contextlib.suppress(Compacted):
            await self._call("KV", "Compact", compaction, DEFRAGMENT_TIMEOUT_S)
        await self._call("Maintenance", "Defragment", pb.DefragmentRequest(), DEFRAGMENT_TIMEOUT_S)
        raised = await self._call("Maintenance", "Alarm", pb.AlarmRequest(action="GET"))
        for alarm in raised.alarms:
            end = pb.AlarmRequest(action="DEACTIVATE", memberID=alarm.memberID, alarm=alarm.alarm)
            await self._call("Maintenance", "Alarm", end)

    async def member_names(self) -> frozenset[str]:
        """The `--name`s of the cluster's members."""
        response = await self._call("Cluster", "MemberList", pb.MemberListRequest())
        return frozenset(member.name for member in response.members)

    # Calls

    @contextlib.asynccontextmanager
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
            metadata = await self._access.metadata(channel, self.timeout_s)
            call = pb.WatchStub(channel).Watch(metadata=(("hasleader", "true"), *metadata))
            try:
                yield call
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            self._give_up_on(index)
            raise from_grpc(error, str(member.endpoint)) from None
        except EtcdUnavailable as error:
            if not self._access.is_renewable(str(error)):
                self._give_up_on(index)
            raise

    def opened(self, changes: Sequence[Change]) -> list[Change]:
        """What a watch has brought, with values whose proof was right, or that need none."""
        return [Change(change.kind, self._opened(change.kv)) for change in changes]

    def _opened(self, kv: KeyValue) -> KeyValue:
        value = self._seal.open(kv.key, kv.value, kv.lease, kv.mod_revision)
        return kv if value is kv.value else replace(kv, value=value)

    def _closed(self, op: Op) -> Op:
        if not isinstance(op, Put):
            return op
        return replace(op, value=self._seal.close(op.key, op.value, op.lease_id))

    async def _call(
        self, service: str, method: str, request: Any, timeout_s: float | None = None
    ) -> Any:
        stub_type = getattr(pb, f"{service}Stub")

        async def once(channel: grpc.aio.Channel, attempt_s: float, metadata: Metadata) -> Any:
            call = getattr(stub_type(channel), method)
            return await call(request, timeout=attempt_s, metadata=metadata)

        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return await self._try_members(once, timeout_s, timeout_s / len(self._members))

    async def _try_members(
        self,
        once: Callable[[grpc.aio.Channel, float, Metadata], Awaitable[_T]],
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
                channel = await member.channel(left_s)
                metadata = await self._access.metadata(channel, left_s)
                return await once(channel, left_s, metadata)
            except grpc.aio.AioRpcError as error:
                if self._access.is_renewable(error.details() or ""):
                    continue
                failure = from_grpc(error, str(member.endpoint))
            except EtcdUnavailable as error:
                failure = error
            if not isinstance(failure, EtcdUnavailable) or isinstance(failure, EtcdNoSpace):
                raise failure
            self._give_up_on(index)
            failures += 1
            delay_s = RETRY_DELAY_S if failures % len(self._members) == 0 else 0.0
            if loop.time() + delay_s >= deadline:
                raise failure
            await asyncio.sleep(delay_s)

    def _give_up_on(self, index: int) -> None:
        """Makes the next member current, unless a call that failed earlier did so already."""
        self._members[index].suspect = True
        if self._current == index:
            self._current = (index + 1) % len(self._members)
