"""One lease, kept alive, and the keys that live and die with it.

The lease id is the session's *epoch*: 63 random bits chosen here, so that a grant whose answer was
lost can be repeated. A lease that is gone (it expired, was revoked, or etcd came back empty) is
replaced: a new epoch begins and every registered key is put again under it.

`alive` is computed here, from when the last acknowledged keepalive was *sent*: so it turns false
no later than etcd drops the keys, whether or not etcd can be reached.

An *exclusive* key belongs to one live process. It fences all other writes of the session: each is
a transaction that compares the key's lease with the epoch, so that a process that was declared
dead cannot write over its successor's keys. A predecessor that died is waited for, one that lives
raises Fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from xllm.coordination.client import EtcdClient
from xllm.coordination.errors import EtcdRefused, Fenced, LeaseExists, LeaseNotFound
from xllm.coordination.records import (
    Compare,
    CompareCreateRevision,
    CompareLease,
    CompareModRevision,
    Delete,
    KeyValue,
    Op,
    Put,
)
from xllm.errors import EtcdUnavailable
from xllm.protocol import Epoch

log = logging.getLogger(__name__)

Value: TypeAlias = bytes | Callable[[Epoch], bytes]
"""What to put; called once per epoch and update when it depends on the epoch."""

REVOKE_TIMEOUT_S = 1.0
"""Of a clean goodbye; without it, the lease expires by itself."""

EXPIRY_MARGIN_S = 2.0
"""etcd rounds the life that a lease has left down to seconds, and looks for dead ones at times."""

POLL_S = 0.25
"""Between attempts to write what could not be written."""


class _Registration:
    """A key that is to be there, and what of it was written last."""

    __slots__ = (
        "exclusive",
        "key",
        "rival",
        "rival_dead_by",
        "settled",
        "value",
        "version",
        "written",
    )

    def __init__(self, key: str, value: Value, exclusive: bool) -> None:
        self.key = key
        self.value = value
        self.exclusive = exclusive
        self.settled = False
        """It was there once; before, `register` is at it and reports what becomes of it."""
        self.version = 0
        """Counts the updates: the same callable may stand for another value each time."""
        self.written: tuple[Epoch, int] | None = None
        """Epoch and version."""
        self.rival = 0
        """The foreign lease that is in the way of an exclusive key."""
        self.rival_dead_by = math.inf
        """When it will have expired, unless its owner lives and renews it."""

    def payload(self, epoch: Epoch) -> bytes:
        return self.value if isinstance(self.value, bytes) else self.value(epoch)


class Session:
    """Run `run()` as a task for as long as the session lives; call `close()` after it ended."""

    def __init__(
        self, client: EtcdClient, ttl_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`ttl_s` is rounded up to whole seconds; etcd may raise it further."""
        self.client = client
        self.ttl_s = math.ceil(ttl_s)
        self._clock = clock
        self._epoch = _new_epoch()
        self._granted = False
        self._alive_until = -math.inf
        self._past_epochs: set[int] = set()
        self._registrations: dict[str, _Registration] = {}
        self._callbacks: list[Callable[[Epoch], None]] = []
        self._writing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._closed = False
        self._waiting = False
        """The last round failed, and the log says so."""

    @property
    def epoch(self) -> Epoch:
        return self._epoch

    @property
    def alive(self) -> bool:
        """Whether etcd still keeps our keys, as far as this side's clock can tell."""
        return self._granted and self._clock() < self._alive_until

    def on_new_epoch(self, callback: Callable[[Epoch], None]) -> None:
        """`callback` is called for each epoch that replaces another, before keys are put again."""
        self._callbacks.append(callback)

    async def register(self, key: str, value: Value, *, exclusive: bool = False) -> None:
        """Puts the key and keeps it there; returns once it is.

        An `exclusive` key waits for the lease of a dead predecessor to expire; there is one per
        session, registered before the keys that it guards.
        Raises: Fenced, EtcdUnavailable, RequestTooLarge; then the key is not registered.
        """
        if exclusive and self._guard is not None:
            raise ValueError(f"{self._guard.key} is this session's exclusive key already")
        registration = _Registration(key, value, exclusive)
        self._registrations[key] = registration
        try:
            while True:
                if await self._write(registration):
                    registration.settled = True
                    return
                await asyncio.sleep(POLL_S)
        except BaseException:
            if self._registrations.get(key) is registration:
                del self._registrations[key]
            raise

    async def update(self, key: str, value: Value) -> None:
        """A new value for a registered key; without etcd, it is written when etcd is back.

        Raises: Fenced, RequestTooLarge.
        """
        registration = self._registrations[key]
        registration.value = value
        registration.version += 1
        try:
            written = await self._write(registration)
        except EtcdUnavailable as error:
            log.debug("etcd_update_postponed key=%s error=%s", key, error)
            written = False
        if not written:
            self._wake.set()

    async def unregister(self, key: str) -> None:
        """The key is no longer kept and is deleted, if it is ours.

        Raises: EtcdUnavailable; then it goes with the lease.
        """
        del self._registrations[key]
        async with self._writing:
            await self.client.txn([CompareLease(key, self._epoch)], [Delete(key)])

    async def fenced_put(self, key: str, value: bytes) -> bool:
        """Puts a key under the lease, unless this epoch is over: then False.

        Raises: EtcdUnavailable, RequestTooLarge.
        """
        epoch = self._epoch
        return await self.fenced_txn([Put(key, value, epoch)], epoch=epoch)

    async def fenced_txn(self, ops: Sequence[Op], *, epoch: Epoch) -> bool:
        """Runs `ops` if `epoch` still holds the exclusive key; False: it does not, nothing ran.

        Raises: EtcdUnavailable, RequestTooLarge; ValueError without an exclusive key.
        """
        if self._guard is None:
            raise ValueError("a session without an exclusive key cannot fence its writes")
        try:
            result = await self.client.txn([CompareLease(self._guard.key, epoch)], ops)
        except LeaseNotFound:
            return False
        return result.succeeded

    async def run(self) -> None:
        """Keeps the lease and the keys until it is cancelled or the session is closed.

        Raises: Fenced.
        """
        while not self._closed:
            self._wake.clear()
            delay_s = await self._tick()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._wake.wait()

    async def close(self) -> None:
        """Revokes the lease, which deletes its keys. Idempotent; never raises for etcd."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        if not self._granted:
            return
        self._granted = False
        try:
            await self.client.revoke(self._epoch, timeout_s=REVOKE_TIMEOUT_S)
        except (EtcdUnavailable, EtcdRefused) as error:
            log.info("etcd_lease_left_to_expire epoch=%x error=%s", self._epoch, error)

    @property
    def _guard(self) -> _Registration | None:
        return next((r for r in self._registrations.values() if r.exclusive), None)

    async def _tick(self) -> float:
        """One round of what has to be done; returns the seconds until the next one is due."""
        try:
            if self._granted:
                await self._keep_alive()
            pending = False
            for registration in list(self._registrations.values()):
                written = (self._epoch, registration.version)
                if registration.settled and registration.written != written:
                    pending |= not await self._write(registration)
            if not self._granted and not self._closed:
                async with self._writing:
                    await self._grant()
        except EtcdUnavailable as error:
            if not self._waiting and not self._closed:
                log.warning("etcd_session_waits epoch=%x error=%s", self._epoch, error)
                self._waiting = True
            return min(POLL_S, self.ttl_s / 10)
        if self._waiting:
            log.info("etcd_session_resumes epoch=%x", self._epoch)
            self._waiting = False
        return POLL_S if pending else self.ttl_s / 3

    async def _keep_alive(self) -> None:
        epoch, sent_at = self._epoch, self._clock()
        left_s = await self.client.keep_alive(epoch, attempt_s=self.ttl_s / 4, timeout_s=self.ttl_s)
        if left_s == 0:
            self._end_epoch(epoch)
        elif epoch == self._epoch:
            self._alive_until = sent_at + left_s

    def _end_epoch(self, epoch: Epoch) -> None:
        """The lease is gone, as one of several calls under way is the first to find out."""
        if epoch != self._epoch or self._closed:
            return
        log.warning("etcd_lease_lost epoch=%x", self._epoch)
        self._past_epochs.add(self._epoch)
        self._granted = False
        self._alive_until = -math.inf
        self._epoch = _new_epoch()

    async def _grant(self) -> None:
        """Gets the epoch its lease, if it has none."""
        if self._granted:
            return
        sent_at = self._clock()
        try:
            self.ttl_s = await self.client.grant(self._epoch, self.ttl_s)
            self._granted = True
            self._alive_until = sent_at + self.ttl_s
        except LeaseExists:
            # It is ours, 63 bits do not collide: from an attempt whose answer was lost, at a time
            # that we do not know. A keepalive will tell how long it lives.
            self._granted = True
            self._wake.set()
        log.info("etcd_lease_granted epoch=%x ttl_s=%g", self._epoch, self.ttl_s)
        if self._past_epochs:
            for callback in self._callbacks:
                callback(self._epoch)

    async def _write(self, registration: _Registration) -> bool:
        """Tries once to put a registered key; True: it is there.

        Raises: Fenced, EtcdUnavailable, RequestTooLarge.
        """
        async with self._writing:
            if self._closed:
                raise EtcdUnavailable("the session is closed")
            await self._grant()
            epoch = self._epoch
            current = (epoch, registration.version)
            if registration.written == current:
                return True
            if not self._granted:
                return False
            put = Put(registration.key, registration.payload(epoch), epoch)
            try:
                if registration.exclusive:
                    done = await self._put_exclusive(registration, put)
                elif self._guard is not None:
                    done = await self.fenced_txn([put], epoch=epoch)
                    if not done:  # taken over, or deleted by hand: find out, put it again
                        self._guard.written = None
                else:
                    await self.client.put(put.key, put.value, put.lease_id)
                    done = True
            except LeaseNotFound:
                self._end_epoch(epoch)
                return False
            if done:
                registration.written = current
            return done

    async def _put_exclusive(self, registration: _Registration, put: Put) -> bool:
        """True: put; False: somebody else's lease is in the way, and may yet expire.

        Raises: Fenced when it had the time to expire and did not.
        """
        key = put.key
        holder = await self.client.get(key)
        if holder is None:
            compare: Compare = CompareCreateRevision(key, 0)
        elif holder.lease == put.lease_id:
            compare = CompareLease(key, put.lease_id)
        elif holder.lease == 0 or holder.lease in self._past_epochs:
            compare = CompareModRevision(key, holder.mod_revision)
        else:
            await self._wait_for(registration, holder)
            return False
        result = await self.client.txn([compare], [put])
        return result.succeeded

    async def _wait_for(self, registration: _Registration, holder: KeyValue) -> None:
        now = self._clock()
        if registration.rival != holder.lease:
            left_s = max(0, await self.client.time_to_live(holder.lease))
            registration.rival = holder.lease
            registration.rival_dead_by = now + left_s + EXPIRY_MARGIN_S
            log.info(
                "etcd_key_held key=%s epoch=%x left_s=%d", registration.key, holder.lease, left_s
            )
        elif now > registration.rival_dead_by:
            raise Fenced(
                f"{registration.key} is held by another live process: "
                "stop that one, or give this one another name"
            )


def _new_epoch() -> Epoch:
    return Epoch(secrets.randbits(63) | 1)
