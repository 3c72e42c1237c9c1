"""Gives commands to workers over etcd, and waits for their outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from xllm.coordination import DELETE, PUT, EtcdClient, EtcdRefused, Keys, Snapshot, watch_prefix
from xllm.errors import EtcdUnavailable
from xllm.protocol import (
    Command,
    CommandKind,
    CommandState,
    MasterId,
    WorkerId,
    WorkerInfo,
)
from xllm.roles.commands import LEASE_S, decode_command, encode_command, is_ended

logger = logging.getLogger(__name__)

MAX_PUTS_AT_ONCE = 16
LEASE_BITS = 63


class CommandDesk:
    """For the event loop; any number of calls at once."""

    def __init__(self, client: EtcdClient, keys: Keys, master_id: MasterId) -> None:
        self._client = client
        self._keys = keys
        self._master_id = master_id

    async def ask(
        self,
        workers: Iterable[WorkerInfo],
        kind: CommandKind,
        deadline_s: float,
        fields: Mapping[str, Any] | None = None,
    ) -> dict[WorkerId, Command]:
        """The same command to each of `workers`, as it stands when all have ended or the deadline
        is over. One that has not ended by then may still be executed, until its lease is over.

        `fields`: more of `Command`. Raises: EtcdUnavailable, EtcdRefused.
        """
        command_id = secrets.token_hex(8)
        commands = {
            worker.worker_id: Command(
                command_id=command_id,
                worker_id=worker.worker_id,
                epoch=worker.epoch,
                kind=kind,
                master_id=self._master_id,
                created_at=time.time(),
                **(fields or {}),
            )
            for worker in workers
        }
        lease_id = secrets.randbits(LEASE_BITS) | 1
        await self._client.grant(lease_id, LEASE_S)
        try:
            await self._put(commands.values(), lease_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):
                    await self._wait(command_id, commands)
        finally:
            await self._clean_up(commands, lease_id)
        return commands

    async def _put(self, commands: Iterable[Command], lease_id: int) -> None:
        slots = asyncio.Semaphore(MAX_PUTS_AT_ONCE)

        async def put(command: Command) -> None:
            key = self._keys.command(command.worker_id, command.command_id)
            async with slots:
                await self._client.put(key, encode_command(command), lease_id)

        results = await asyncio.gather(*map(put, commands), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _wait(self, command_id: str, commands: dict[WorkerId, Command]) -> None:
        """Keeps `commands` up to date until all have ended."""
        open_ids = set(commands)
        suffix = f"/{command_id}"
        async with aclosing(watch_prefix(self._client, self._keys.commands)) as updates:
            async for update in updates:
                gone: set[WorkerId] = set()
                if isinstance(update, Snapshot):
                    kvs = [kv for kv in update.kvs if kv.key.endswith(suffix)]
                    gone = open_ids - {self._keys.worker_of_command(kv.key) for kv in kvs}
                else:
                    ours = [change for change in update if change.kv.key.endswith(suffix)]
                    kvs = [change.kv for change in ours if change.kind is PUT]
                    gone = {
                        self._keys.worker_of_command(change.kv.key)
                        for change in ours
                        if change.kind is DELETE
                    } & open_ids
                for kv in kvs:
                    command = decode_command(kv.value)
                    if command is not None and command.worker_id in open_ids:
                        commands[command.worker_id] = command
                        if is_ended(command):
                            open_ids.discard(command.worker_id)
                for worker_id in gone:
                    commands[worker_id] = msgspec.structs.replace(
                        commands[worker_id],
                        state=CommandState.FAILED,
                        error="dropped before its outcome was known: the worker or etcd is gone",
                    )
                open_ids -= gone
                if not open_ids:
                    return

    async def _clean_up(self, commands: Mapping[WorkerId, Command], lease_id: int) -> None:
        """Drops what has ended; the rest stays for its worker until the lease is over."""
        try:
            if all(is_ended(command) for command in commands.values()):
                await self._client.revoke(lease_id)
                return
            for command in commands.values():
                if is_ended(command):
                    key = self._keys.command(command.worker_id, command.command_id)
                    await self._client.delete(key)
        except (EtcdUnavailable, EtcdRefused) as error:
            logger.info("commands_left_to_expire lease=%x error=%r", lease_id, str(error))
