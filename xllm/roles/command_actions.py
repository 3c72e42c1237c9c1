"""What a worker does when an operator wants it, between two steps of its engine."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from xllm.cache.tier import TierName
from xllm.errors import InvalidRequest
from xllm.protocol import BlockHash, Command, CommandKind, FetchRange
from xllm.roles.cache_port import by_name, describe_lookup, look_up
from xllm.roles.commands import Done, split_names

if TYPE_CHECKING:
    from xllm.engine.engine import Engine

Prefetch = Callable[[Sequence[BlockHash], Sequence[FetchRange]], Awaitable[int]]
"""Fetches a prompt's blocks from the peers that are named; returns how many have come."""

CLEARABLE = tuple(TierName)


class CommandActions:
    """`execute` is what a `CommandRunner` runs."""

    def __init__(
        self,
        engine: Engine,
        drain: Callable[[float | None], object],
        prefetch: Prefetch | None = None,
    ) -> None:
        """`drain` begins to drain the process, in so many seconds or its own; `prefetch`: None
        where blocks cannot be fetched from peers."""
        self._engine = engine
        self._drain = drain
        self._prefetch = prefetch

    async def execute(self, command: Command) -> Done:
        """Raises: ValueError, InvalidRequest, NoWorker."""
        if command.kind is CommandKind.DRAIN:
            timeout_s = command.timeout_s
            if timeout_s is not None and not 0 <= timeout_s < math.inf:
                raise ValueError(f"timeout_s={timeout_s}: expected seconds")
            return Done({"draining": True}, partial(self._drain, timeout_s))
        return Done(await self._change_cache(command, split_names(command.blocks)))

    async def _change_cache(self, command: Command, names: list[BlockHash]) -> dict[str, Any]:
        engine = self._engine
        admin = engine.cache_admin
        match command.kind:
            case CommandKind.LOOKUP:
                found = await look_up(engine, names)
                return describe_lookup(found)
            case CommandKind.CLEAR:
                tier = None if command.tier is None else _clearable(command.tier)
                return {"cleared_blocks": by_name(await engine.call(lambda: admin.clear(tier)))}
            case CommandKind.PIN:
                ttl_s = command.ttl_s
                num_pinned = await engine.call(lambda: admin.pin_blocks(names, ttl_s))
                return {"pinned_blocks": num_pinned}
            case CommandKind.UNPIN:
                return {"unpinned_blocks": await engine.call(lambda: admin.unpin_blocks(names))}
            case CommandKind.MOVE:
                if self._prefetch is None:
                    raise InvalidRequest("not supported: this worker fetches no blocks from others")
                return {"fetched_blocks": await self._prefetch(names, command.fetch)}
        raise ValueError(f"unknown command {command.kind}")


def _clearable(name: str) -> TierName:
    tier = next((tier for tier in CLEARABLE if tier == name), None)
    if tier is None:
        raise InvalidRequest(f"tier {name!r}: expected {', '.join(CLEARABLE)}")
    return tier
