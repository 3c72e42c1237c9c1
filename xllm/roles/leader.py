"""What one master does for the whole cluster while it is elected, once a second:

    shares        the budget for writes to etcd, divided anew when workers come, go or want more;
                  published as the value of `leader`
    compaction    history of an etcd that a master has started, of another one only if asked to
    commands      those that nobody will execute or read any more are dropped

`extend` may add to the word before it is published: what else the leader has to tell everybody.

Two masters may believe that they lead for a moment: a word is put only by whoever holds the key,
and the other duties do no harm if they are done twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from xllm.config import IndexConfig
from xllm.coordination import (
    Compacted,
    Election,
    EtcdClient,
    EtcdRefused,
    Keys,
    is_embedded,
)
from xllm.errors import EtcdUnavailable
from xllm.protocol import LeaderWord, MasterId, WorkerId
from xllm.roles.commands import is_stale
from xllm.roles.leader_word import encode_word
from xllm.roles.upload_shares import Need, divide

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
TIDY_PERIOD_S = 10.0
KEPT_HISTORY_S = 20.0
"""For watches that were interrupted: longer ones read everything again. At the default budget this
is 200 MB of etcd's file, and as much again until the next compaction."""


class Leader:
    """`run` it beside the election; it does nothing while another master leads."""

    def __init__(
        self,
        election: Election,
        client: EtcdClient,
        keys: Keys,
        master_id: MasterId,
        config: IndexConfig,
        upload_needs: Callable[[], Mapping[WorkerId, Need]],
        clock: Callable[[], float],
        extend: Callable[[LeaderWord], LeaderWord] = lambda word: word,
    ) -> None:
        self._election = election
        self._client = client
        self._keys = keys
        self._master_id = master_id
        self._config = config
        self._upload_needs = upload_needs
        self._clock = clock
        self._extend = extend
        self._word: LeaderWord | None = None
        """The one in etcd; None: not ours, or not known."""
        self._tidied_at = 0.0
        self._revisions: deque[tuple[float, int]] = deque()
        """When which revision was the last, oldest first."""
        self._absent_since: dict[WorkerId, float] = {}

    async def run(self) -> None:
        """Until cancelled. `upload_needs` names the workers that are registered."""
        waits = False
        while True:
            try:
                if self._election.is_leader:
                    await self._lead()
                else:
                    self._word = None
                    self._revisions.clear()
                waits = False
            except (EtcdUnavailable, EtcdRefused) as error:
                if not waits:
                    logger.info("leader_waits error=%r", str(error))
                waits = True
            await asyncio.sleep(PERIOD_S)

    async def _lead(self) -> None:
        before = self._word
        word = self._extend(divide(self._config, self._master_id, self._upload_needs(), before))
        if word != before and await self._election.update(encode_word(word)):
            self._word = word
        now = self._clock()
        if now - self._tidied_at >= TIDY_PERIOD_S:
            self._tidied_at = now
            await self._compact(now)
            await self._drop_stale_commands(now)

    async def _compact(self, now: float) -> None:
        """Down to what was the last revision `KEPT_HISTORY_S` ago."""
        is_ours = is_embedded(await self._client.member_names())
        if not is_ours and not self._config.etcd_compact:
            return
        status = await self._client.status()
        if self._revisions and status.revision < self._revisions[-1][1]:
            self._revisions.clear()  # etcd came back empty
        old: int | None = None
        while self._revisions and self._revisions[0][0] <= now - KEPT_HISTORY_S:
            old = self._revisions.popleft()[1]
        self._revisions.append((now, status.revision))
        if old is not None:
            with contextlib.suppress(Compacted):
                await self._client.compact(old)
        if is_ours and status.no_space:
            # It would stay full although there is room: nobody but us looks after it.
            logger.warning("embedded_etcd_full action='compact, defragment, disarm'")
            await self._client.make_room(status.revision)

    async def _drop_stale_commands(self, now: float) -> None:
        snapshot = await self._client.range(self._keys.commands)
        if not snapshot.kvs:
            self._absent_since.clear()
            return
        present = self._upload_needs().keys()
        self._note_absent({self._keys.worker_of_command(kv.key) for kv in snapshot.kvs}, present)
        for kv in snapshot.kvs:
            absent_since = self._absent_since.get(self._keys.worker_of_command(kv.key))
            absent_s = 0.0 if absent_since is None else now - absent_since
            if is_stale(kv.value, absent_s):
                logger.info("command_dropped key=%s", kv.key)
                await self._client.delete(kv.key)

    def _note_absent(self, addressed: Iterable[WorkerId], present: Iterable[WorkerId]) -> None:
        now = self._clock()
        absent = set(addressed) - set(present)
        self._absent_since = {w: self._absent_since.get(w, now) for w in absent}
