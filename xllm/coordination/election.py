"""One leader among the sessions that want to be it.

The leader is whoever's lease holds the key; the key dies with the lease, and the others, who watch
it, try to put their own. `is_leader` also asks the session's own clock, so a leader that cannot
reach etcd steps down before another can step up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import aclosing

from xllm.coordination.errors import LeaseNotFound
from xllm.coordination.records import (
    PUT,
    CompareCreateRevision,
    CompareLease,
    KeyValue,
    Put,
    Snapshot,
)
from xllm.coordination.session import Session
from xllm.coordination.watch import WatchItem, watch_prefix
from xllm.errors import EtcdUnavailable

log = logging.getLogger(__name__)

RETRY_S = 0.25
"""Between two attempts while the key is free but could not be put."""


class Election:
    """Run `run()` as a task beside the session's."""

    def __init__(self, session: Session, key: str, value: bytes) -> None:
        """`value` is what the key holds while this session leads."""
        self._session = session
        self._key = key
        self._value = value
        self._holder: KeyValue | None = None
        self._known = False
        self._moved = asyncio.Event()

    @property
    def is_leader(self) -> bool:
        holder = self._holder
        session = self._session
        return holder is not None and holder.lease == session.epoch and session.alive

    @property
    def leader(self) -> bytes | None:
        """The leader's value, as far as known; None: there is none."""
        return None if self._holder is None else self._holder.value

    async def update(self, value: bytes) -> bool:
        """Changes the value; True: it is in etcd, because this session leads.

        Raises: EtcdUnavailable, RequestTooLarge.
        """
        self._value = value
        epoch = self._session.epoch
        with contextlib.suppress(LeaseNotFound):
            result = await self._session.client.txn(
                [CompareLease(self._key, epoch)], [Put(self._key, value, epoch)]
            )
            return result.succeeded
        return False

    async def run(self) -> None:
        """Wants to lead until it is cancelled; resigning is closing the session."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._campaign())

    async def _follow(self) -> None:
        async with aclosing(watch_prefix(self._session.client, self._key)) as items:
            async for item in items:
                led = self.is_leader
                self._holder = _holder_after(item, self._key, self._holder)
                self._known = True
                self._moved.set()
                if self.is_leader != led:
                    log.info("leader_changed key=%s is_leader=%s", self._key, not led)

    async def _campaign(self) -> None:
        while True:
            delay_s = None
            self._moved.clear()
            if self._known and self._holder is None:
                await self._try_to_lead()
                delay_s = RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._moved.wait()

    async def _try_to_lead(self) -> None:
        """Puts the key if it is free; the watch tells what came of it."""
        if not self._session.alive:
            return
        put = Put(self._key, self._value, self._session.epoch)
        with contextlib.suppress(EtcdUnavailable, LeaseNotFound):
            await self._session.client.txn([CompareCreateRevision(self._key, 0)], [put])


def _holder_after(item: WatchItem, key: str, holder: KeyValue | None) -> KeyValue | None:
    """Who holds the key after `item`; other keys that start with its name do not count."""
    if isinstance(item, Snapshot):
        return next((kv for kv in item.kvs if kv.key == key), None)
    for change in item:
        if change.kv.key == key:
            holder = change.kv if change.kind is PUT else None
    return holder
