"""Executes the commands that etcd has for this worker, each at most once.

A command is claimed before it is executed and its outcome written after that; `roles/commands.py`
has the states. A claim or an outcome whose answer was lost is looked for in etcd before it is
written again. Commands that came while etcd could not be reached are found by the watch when it
resumes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from xllm.coordination import (
    PUT,
    Change,
    CompareLease,
    CompareModRevision,
    EtcdRefused,
    Keys,
    KeyValue,
    LeaseNotFound,
    Put,
    Session,
    Snapshot,
    watch_prefix,
)
from xllm.coordination.records import Compare
from xllm.errors import EtcdUnavailable, XllmError
from xllm.protocol import Command, CommandState, Epoch, WorkerId
from xllm.roles.commands import LEASE_S, Done, decode_command, encode_command, is_ended

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 16
RETRY_S = 0.5

Execute = Callable[[Command], Awaitable[Done]]
"""Raises: XllmError or ValueError with a reason that operators understand."""


class CommandRunner:
    """`session` has `workers/{worker_id}` as its exclusive key before `run` starts."""

    def __init__(self, session: Session, keys: Keys, worker_id: WorkerId, execute: Execute) -> None:
        self._session = session
        self._keys = keys
        self._worker_id = worker_id
        self._execute = execute
        self._epochs: set[Epoch] = {session.epoch}
        """Of this process."""
        session.on_new_epoch(self._epochs.add)
        self._begun: dict[str, float] = {}
        """Commands that this process has taken up, by id, and when: for longer than any of them is
        valid, so that none is executed again if somebody puts it back."""
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled."""
        prefix = self._keys.commands_of(self._worker_id)
        async with (
            asyncio.TaskGroup() as tasks,
            aclosing(watch_prefix(self._session.client, prefix)) as updates,
        ):
            async for update in updates:
                if isinstance(update, Snapshot):
                    update = [Change(PUT, kv) for kv in update.kvs]
                for change in update:
                    if change.kind is PUT and (command := self._take_up(change.kv)) is not None:
                        await self._slots.acquire()
                        task = tasks.create_task(self._handle(change.kv, command))
                        task.add_done_callback(lambda _: self._slots.release())

    def _take_up(self, kv: KeyValue) -> Command | None:
        """The command that is to be handled, if this is news."""
        command = decode_command(kv.value)
        if command is None or is_ended(command) or command.command_id in self._begun:
            return None
        now = time.monotonic()
        while self._begun and next(iter(self._begun.values())) < now - 3 * LEASE_S:
            del self._begun[next(iter(self._begun))]
        self._begun[command.command_id] = now
        return command

    async def _handle(self, kv: KeyValue, command: Command) -> None:
        if abs(time.time() - command.created_at) > LEASE_S:
            reason = f"it was given over {LEASE_S} s ago, or the clocks differ by so much"
            await self._write(kv, _ended(command, error=reason))
            return
        if command.epoch not in self._epochs:
            reason = "it was meant for an earlier run of this worker"
            if command.state is CommandState.RUNNING:
                reason = "the worker has ended while it ran"
            await self._write(kv, _ended(command, error=reason))
            return
        running = msgspec.structs.replace(command, state=CommandState.RUNNING)
        claimed = None
        if command.state is CommandState.PENDING:
            claimed = await self._write(kv, running)
        if claimed is None:
            logger.info("command_not_claimed command_id=%s", command.command_id)
            return
        logger.info("command_begins command_id=%s kind=%s", command.command_id, command.kind)
        done = Done({})
        try:
            done = await self._execute(command)
            ended = _ended(command, outcome=done.outcome)
        except (XllmError, ValueError) as error:
            ended = _ended(command, error=str(error))
        except Exception:
            # A defect of ours: the requests that run here are not to suffer from it.
            logger.exception("command_crashed command_id=%s", command.command_id)
            ended = _ended(command, error="internal error: see the worker's log")
        logger.info("command_ended command_id=%s state=%s", command.command_id, ended.state)
        await self._write(claimed, ended)
        if done.then is not None:
            done.then()

    async def _write(self, kv: KeyValue, command: Command) -> KeyValue | None:
        """Replaces the command that `kv` has, if it is still that one; returns what is there now.

        None: somebody else has changed or dropped it, or this worker has been replaced.
        """
        value = encode_command(command)
        while True:
            epoch = self._session.epoch
            compares: list[Compare] = [
                CompareModRevision(kv.key, kv.mod_revision),
                CompareLease(self._keys.worker(self._worker_id), epoch),
            ]
            client = self._session.client
            try:
                result = await client.txn(compares, [Put(kv.key, value, kv.lease)])
                if result.succeeded:
                    return KeyValue(kv.key, value, kv.create_revision, result.revision, kv.lease)
                now = await client.get(kv.key)
            except LeaseNotFound:
                return None
            except (EtcdUnavailable, EtcdRefused) as error:
                logger.info("command_waits key=%s error=%r", kv.key, str(error))
                await asyncio.sleep(RETRY_S)
                continue
            if now is not None and now.value == value:
                return now
            if now is None or now.mod_revision != kv.mod_revision or now.lease != kv.lease:
                return None
            # The command is as it was, so our registration is not: it is about to be put again.
            await asyncio.sleep(RETRY_S)


def _ended(command: Command, *, outcome: dict[str, Any] | None = None, error: str = "") -> Command:
    return msgspec.structs.replace(
        command,
        state=CommandState.FAILED if outcome is None else CommandState.DONE,
        outcome=outcome or {},
        error=error,
        ended_at=time.time(),
    )
