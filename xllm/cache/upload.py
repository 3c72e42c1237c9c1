"""Writes a worker's `UploadPlan` to etcd, for as long as it runs.

Every write is a transaction that compares the lease of `workers/{id}` with the epoch, so a worker
that was replaced cannot write. Nothing that happens here reaches a request: without etcd, or with
an etcd that is full, blocks stay local knowledge until it is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from xllm.cache.block_pool import BlockEvent
from xllm.cache.event_codec import TierCode
from xllm.cache.upload_budget import Share
from xllm.cache.upload_plan import Failure, UploadPlan, UploadStatistics, Write
from xllm.coordination import DeleteRange, EtcdNoSpace, EtcdRefused, Keys, Put, Session
from xllm.coordination.records import Op
from xllm.errors import EtcdUnavailable
from xllm.protocol import Epoch, WorkerId

logger = logging.getLogger(__name__)

SLICE_EVENTS = 1024
"""Recorded before anybody else gets the loop: half a millisecond. More come at once only when a
disk is found full of blocks."""


class IndexUploader:
    """Publishes what it is told of. All methods are for the event loop that runs `run`.

    `session` has `workers/{worker_id}` registered as its exclusive key before `run` starts.
    """

    def __init__(
        self,
        session: Session,
        keys: Keys,
        worker_id: WorkerId,
        plan: UploadPlan,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._keys = keys
        self._worker_id = worker_id
        self._plan = plan
        self._clock = clock
        self._epoch: Epoch | None = None
        self._backlog: deque[tuple[TierCode, Sequence[BlockEvent]]] = deque()
        self._wake = asyncio.Event()
        self._trouble: Failure | None = None
        """Why the last write failed; each reason is logged once."""
        session.on_new_epoch(lambda _: self._wake.set())

    def record(self, tier: TierCode, events: Sequence[BlockEvent]) -> None:
        """Events of one tier, in order."""
        if self._backlog or len(events) > SLICE_EVENTS:
            for start in range(0, len(events), SLICE_EVENTS):
                self._backlog.append((tier, events[start : start + SLICE_EVENTS]))
        else:
            self._plan.record(tier, events, self._clock())
        self._wake.set()

    def touch(self, blocks: Iterable[int]) -> None:
        """These blocks, by short hash, served a prompt."""
        self._plan.touch(blocks)

    def set_share(self, share: Share) -> None:
        self._plan.set_share(share, self._clock())
        self._wake.set()

    def statistics(self) -> UploadStatistics:
        return self._plan.statistics()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._wake.clear()
            while self._backlog:
                self._plan.record(*self._backlog.popleft(), self._clock())
                await asyncio.sleep(0)
            now = self._clock()
            if self._epoch != self._session.epoch:
                self._plan.begin_epoch(now, after_outage=self._epoch is not None)
                self._epoch = self._session.epoch
            write = self._plan.take(now)
            if write is not None:
                await self._send(write, self._epoch)
                continue
            due_at = self._plan.due_at(now)
            try:
                async with asyncio.timeout(due_at - now if due_at < math.inf else None):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _send(self, write: Write, epoch: Epoch) -> None:
        folder = self._keys.cache_of(self._worker_id, epoch)
        ops: list[Op] = [Put(folder + key, value, epoch) for key, value in write.puts]
        ops += [DeleteRange(folder + first, folder + end) for first, end in write.deletes]
        try:
            is_ours = await self._session.fenced_txn(ops, epoch=epoch)
        except EtcdNoSpace:
            self._fail(Failure.NO_SPACE, "etcd is full: compact and defragment it")
        except (EtcdUnavailable, EtcdRefused) as error:
            self._fail(Failure.UNAVAILABLE, str(error))
        else:
            if self._trouble is not None:
                self._trouble = None
                logger.info("index_upload_resumed worker_id=%s", self._worker_id)
            if is_ours:
                self._plan.written(self._clock())
            else:
                # The session is about to register again, or has already.
                self._plan.fenced()
                self._plan.begin_epoch(self._clock(), after_outage=True)
                self._epoch = self._session.epoch

    def _fail(self, failure: Failure, reason: str) -> None:
        if self._trouble is not failure:
            self._trouble = failure
            logger.warning("index_upload_stopped worker_id=%s reason=%r", self._worker_id, reason)
        self._plan.failed(failure, self._clock())
