"""What a registered worker does beside requests: it publishes its load and its blocks, heeds the
leader and executes operators' commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xllm.coordination import Keys, Session
from xllm.protocol import BlockHash, FetchRange, LeaderWord, WorkerId
from xllm.roles.cache_upload import CacheUpload
from xllm.roles.command_actions import CommandActions
from xllm.roles.command_runner import CommandRunner
from xllm.roles.leader_word import follow_leader
from xllm.roles.membership import WorkerMembership

if TYPE_CHECKING:
    from xllm.engine.engine import Engine


async def run_duties(
    session: Session,
    keys: Keys,
    worker_id: WorkerId,
    membership: WorkerMembership,
    upload: CacheUpload | None,
    engine: Engine,
    drain: Callable[[float | None], object],
) -> None:
    """Until cancelled, or the session is fenced. `upload`: None: the index is not told anything.

    `drain` begins to drain the process.
    """

    def heed(word: LeaderWord) -> None:
        membership.load_period_s = word.load_period_s
        if upload is not None:
            upload.heed(word)

    async def prefetch(names: Sequence[BlockHash], fetch: Sequence[FetchRange]) -> int:
        return (await engine.prefetch(list(names), list(fetch))).num_fetched

    has_peers = engine.tiers is not None and engine.tiers.peers is not None
    actions = CommandActions(engine, drain, prefetch if has_peers else None)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(membership.publish_load())
        tasks.create_task(follow_leader(session.client, keys, heed))
        tasks.create_task(CommandRunner(session, keys, worker_id, actions.execute).run())
        if upload is not None:
            tasks.create_task(upload.run())
