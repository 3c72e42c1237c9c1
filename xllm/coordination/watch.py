"""A watch that survives everything: what it yields always adds up to the state in etcd.

It starts with a Snapshot and goes on with the changes after it. A broken connection, a frozen
member or a member without majority is left for another endpoint, and the watch resumes after the
last revision that was delivered, so that no change is lost or repeated. Where that cannot be, the
consumer gets a fresh Snapshot, which replaces all it knew:

- the changes in between were compacted away;
- etcd came back empty or was restored: to a watch from a revision that is yet to come, this looks
  like silence. So before each stream, the watch makes sure that history is still the one that
  it knows: it looks for the last put that it saw (see `_History`).

A member is alive as long as it answers: a progress request is sent whenever the stream has been
silent for `HEARTBEAT_S`. Its answer carries a revision that is *not* used for resuming, because
etcd before 3.5.8 may send it ahead of changes that come before that revision.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from etcd3aio import _protobuf as pb

from xllm.coordination import wire
from xllm.coordination.client import EtcdClient
from xllm.coordination.errors import Compacted, EtcdRefused
from xllm.coordination.records import (
    PUT,
    Change,
    Snapshot,
    prefix_end,
)
from xllm.errors import EtcdUnavailable

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""Silence after which a progress request is sent."""

MAX_UNANSWERED = 2
"""After this many progress requests and another `HEARTBEAT_S`, the member counts as frozen."""

RECONNECT_DELAY_S = 0.2

WatchItem: TypeAlias = Snapshot | list[Change]


class _Diverged(Exception):
    """The history that the watch knows is not etcd's: start over with a Snapshot."""


class _History:
    """How far the consumer has come, and how to tell whether etcd has the same past.

    `witness` is the last put that was delivered: an etcd with the same history still has it, with
    the same lease, which is 63 random bits. It is looked for at the revision reached, which is
    compacted no sooner than the watch itself could not resume; once it was deleted, at its own.
    Without a witness nothing was ever there, and any history without anything there will do.
    """

    __slots__ = ("deleted", "prefix", "revision", "witness")

    def __init__(self, prefix: str, snapshot: Snapshot) -> None:
        self.prefix = prefix
        self.revision = snapshot.revision
        self.witness = max(snapshot.kvs, key=lambda kv: kv.mod_revision, default=None)
        self.deleted = False

    def advance(self, events: Sequence[Any]) -> list[Change]:
        """The events as changes, which from now on are the consumer's past."""
        changes = list(map(wire.change, events))
        for change in changes:
            if change.kind is PUT:
                self.witness, self.deleted = change.kv, False
            elif self.witness is not None and change.kv.key == self.witness.key:
                self.deleted = True
        if changes:
            self.revision = changes[-1].kv.mod_revision
        return changes

    async def check(self, client: EtcdClient) -> None:
        """Raises: _Diverged, Compacted, EtcdUnavailable."""
        witness = self.witness
        try:
            if witness is None:
                same = await client.is_empty(self.prefix, revision=self.revision)
            else:
                revision = witness.mod_revision if self.deleted else self.revision
                same = await client.get(witness.key, revision=revision) == witness
        except Compacted:
            raise
        except EtcdRefused as error:  # a revision that is yet to come
            raise _Diverged(str(error)) from None
        if not same:
            raise _Diverged(f"revision {self.revision} of etcd is not the one that was seen")


async def watch_prefix(client: EtcdClient, prefix: str) -> AsyncGenerator[WatchItem, None]:
    """Yields a Snapshot, then batches of changes in the order of their revisions.

    Any later Snapshot replaces the state and all changes before it. Goes on for ever: an etcd
    that cannot be reached is waited for. Leave with `aclosing` or by cancelling the task.
    """
    while True:
        snapshot = await _read_snapshot(client, prefix)
        yield snapshot
        history = _History(prefix, snapshot)
        interrupted = False
        try:
            while True:
                try:
                    await history.check(client)
                    interrupted = False
                    async with aclosing(_stream(client, history)) as stream:
                        async for changes in stream:
                            yield changes
                except EtcdUnavailable as error:
                    if not interrupted:
                        log.info("etcd_watch_interrupted prefix=%s error=%s", prefix, error)
                        interrupted = True
                    await asyncio.sleep(RECONNECT_DELAY_S)
        except (_Diverged, Compacted) as error:
            log.warning("etcd_watch_resync prefix=%s reason=%s", prefix, error)


async def _read_snapshot(client: EtcdClient, prefix: str) -> Snapshot:
    waiting = False
    while True:
        try:
            return await client.range(prefix)
        except EtcdUnavailable as error:
            if not waiting:
                log.info("etcd_watch_waits prefix=%s error=%s", prefix, error)
                waiting = True
            await asyncio.sleep(RECONNECT_DELAY_S)


async def _stream(client: EtcdClient, history: _History) -> AsyncGenerator[list[Change], None]:
    """One connection's worth of changes after `history.revision`.

    Raises: EtcdUnavailable when it ends, Compacted.
    """
    create = pb.WatchCreateRequest(
        key=history.prefix.encode(),
        range_end=prefix_end(history.prefix),
        start_revision=history.revision + 1,
        fragment=True,
    )
    events: list[Any] = []
    async with client.watch_call() as call:
        first = pb.WatchRequest(create_request=create)
        async with aclosing(_responses(call, first, client.timeout_s)) as responses:
            async for response in responses:
                if response.compact_revision:
                    raise Compacted(f"revisions up to {response.compact_revision} are gone")
                if response.canceled:
                    raise EtcdUnavailable(f"watch refused: {response.cancel_reason}")
                events += response.events
                # A fragment may end amid a revision, whose changes have to stay together.
                cut = _start_of_last_revision(events) if response.fragment else len(events)
                if changes := history.advance(events[:cut]):
                    yield client.opened(changes)
                del events[:cut]


def _start_of_last_revision(events: Sequence[Any]) -> int:
    index = len(events) - 1
    while index > 0 and events[index - 1].kv.mod_revision == events[index].kv.mod_revision:
        index -= 1
    return max(index, 0)


async def _responses(call: Any, first: Any, timeout_s: float) -> AsyncGenerator[Any, None]:
    """What etcd answers to the first request, and to heartbeats whenever it is silent.

    Raises: EtcdUnavailable when the member does not answer or ends the stream.
    """
    reading: asyncio.Task[Any] | None = None
    unanswered = 0
    try:
        async with asyncio.timeout(timeout_s):
            await call.write(first)
        while True:
            if reading is None:
                reading = asyncio.create_task(call.read())
            await asyncio.wait((reading,), timeout=HEARTBEAT_S)
            if reading.done():
                response = reading.result()
                reading = None
                unanswered = 0
                if not isinstance(response, pb.WatchResponse):  # end of the stream
                    raise EtcdUnavailable("etcd ended the watch")
                yield response
            elif unanswered == MAX_UNANSWERED:
                raise EtcdUnavailable(f"etcd did not answer {unanswered} heartbeats of a watch")
            else:
                unanswered += 1
                async with asyncio.timeout(HEARTBEAT_S):
                    await call.write(_progress_request())
    except TimeoutError:
        raise EtcdUnavailable("etcd does not read what a watch sends") from None
    except asyncio.InvalidStateError:  # a heartbeat met the end of the stream
        raise EtcdUnavailable("etcd ended the watch") from None
    finally:
        if reading is not None:
            reading.cancel()
            reading.add_done_callback(_ignore_outcome)


def _progress_request() -> Any:
    request = pb.WatchRequest()
    request.progress_request.SetInParent()
    return request


def _ignore_outcome(reading: asyncio.Task[Any]) -> None:
    if not reading.cancelled():
        reading.exception()
