"""The shared store as a medium: the agent's process, the threads that talk to it, and its absence.

    engine thread                    lane threads                        agent (a process)
    -------------                    ------------                        -----------------
    start ───────────queues───────>  ask, get, get, put: one job at a
    Mover.take_ended <──one queue──  time each, with a deadline  ──────> one call each

                                     "store-attach" thread
    generation, is_attached  <─────  starts the agent; after a failure
                                     again, 1, 2, 4 .. 60 s later

What is a failure: the agent cannot attach (its package or the store's master is absent), ends, or
does not answer in time, and is killed then; all of these take a new agent. Or the store's master
does not answer the agent: the agent stays, with the segment that it lends to the pool, and is asked
until the master is back. Either way the store is detached meanwhile: jobs fail at once.

Mooncake's client polls until a call has ended, with the core that it is called on (as the wheel of
0.3.13 is built: without USE_EVENT_DRIVEN_COMPLETION). So the agent's lanes step back for those who
move the bytes, and for the engine: far for puts, which nobody waits for, less far for gets.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from xllm.cache.host_tier import DeviceBlocks
from xllm.cache.memory import populate
from xllm.cache.mover import Mover, Transfer
from xllm.cache.slab_format import Buffer
from xllm.cache.store_jobs import Ask, Get, JobState, Put, Remove, StoreJob
from xllm.cache.store_object import key_prefix, slot_stride
from xllm.cache.store_process import StoreAddress, StoreAgent
from xllm.cache.store_wire import Op, Request
from xllm.cache.threads import LOWEST_PRIORITY, lower_priority
from xllm.errors import StoreUnavailable
from xllm.protocol import BlockHash

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 10.0
"""Then the agent is killed. Nobody waits for so long: loads have deadlines of their own."""
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
CHECK_S = 0.5

GET_BYTES = 16 << 20
"""Of the slots of one lane, and so of one get, which costs a millisecond whatever its size."""
PUT_BYTES = 16 << 20
"""Of the slots of blocks on their way to the store."""

_ASK, _PUT, *_GETS = range(4)
_NUM_LANES = 4
GET_NICENESS = 15
"""Loads are as fast with it as can be on an idle machine, cost the steps beside them least, and are
not starved by these as they are with 19 (docs/store.md has the figures)."""
_NICENESS = {_ASK: 0, _PUT: LOWEST_PRIORITY} | dict.fromkeys(_GETS, GET_NICENESS)


class StoreSlots:
    """How the shared memory is divided. Pure."""

    def __init__(self, block_bytes: int) -> None:
        self.stride = slot_stride(block_bytes)
        self.num_get = max(1, GET_BYTES // self.stride)
        """Of each lane."""
        self.num_put = max(2, PUT_BYTES // self.stride)

    @property
    def num_slots(self) -> int:
        return len(_GETS) * self.num_get + self.num_put

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.stride

    @property
    def put_slots(self) -> range:
        return range(len(_GETS) * self.num_get, self.num_slots)

    def get_slots(self, lane: int) -> range:
        """Empty for a lane that does not get."""
        if lane not in _GETS:
            return range(0)
        first = _GETS.index(lane) * self.num_get
        return range(first, first + self.num_get)


class StoreClient:
    """`start` and `try_cancel` are for the engine's thread; `on_change` is called on any."""

    def __init__(
        self,
        address: StoreAddress,
        root: BlockHash,
        device: DeviceBlocks,
        mover: Mover,
        on_change: Callable[[], None],
    ) -> None:
        """Attaches in the background. `root`: of the cache, without salt; `on_change`: called when
        `generation` or `is_attached` have changed."""
        self.prefix = key_prefix(root)
        self.device = device
        self.slots = StoreSlots(device.block_bytes)
        self.is_attached = False
        self.generation = 0
        """Of attachments and detachments."""
        self.num_detachments = 0
        self._address = address
        self._mover = mover
        self._on_change = on_change
        self._memory_fd = os.memfd_create("xllm-store")
        os.ftruncate(self._memory_fd, self.slots.num_bytes)
        self._memory = np.frombuffer(
            mmap.mmap(self._memory_fd, self.slots.num_bytes), dtype=np.uint8
        )
        self._lock = threading.Lock()
        """Of the states of jobs."""
        self._agent: StoreAgent | None = None
        self._trouble: StoreUnavailable | None = None
        self._has_trouble = threading.Event()
        self._is_closing = threading.Event()
        self._may_leave = threading.Event()
        """No lane uses the agent any more."""
        self._queues: dict[int, queue.SimpleQueue[tuple[StoreJob, Transfer | None] | None]]
        gets: queue.SimpleQueue[tuple[StoreJob, Transfer | None] | None] = queue.SimpleQueue()
        self._queues = {_ASK: queue.SimpleQueue(), _PUT: queue.SimpleQueue()}
        self._queues |= dict.fromkeys(_GETS, gets)
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"store-{lane}", daemon=True)
            for lane in range(_NUM_LANES)
        ]
        self._attaching = threading.Thread(target=self._attach, name="store-attach", daemon=True)
        for thread in (*self._threads, self._attaching):
            thread.start()

    def slot(self, index: int) -> Buffer:
        """[slot_stride] of the shared memory."""
        start = index * self.slots.stride
        return self._memory[start : start + self.slots.stride]

    def start(self, job: StoreJob, transfer: Transfer | None) -> None:
        """Queues a job; `transfer`, if anybody wants to know, ends elsewhere when it has ended."""
        lane = _PUT if isinstance(job, Put | Remove) else _ASK if isinstance(job, Ask) else _GETS[0]
        self._queues[lane].put((job, transfer))

    def try_cancel(self, job: StoreJob) -> bool:
        """Takes back a job that has not begun."""
        with self._lock:
            if job.state is not JobState.QUEUED:
                return False
            job.state = JobState.CANCELLED
            return True

    def close(self, timeout_s: float) -> None:
        """Ends the threads, and the agent in its own time. Idempotent."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        self._has_trouble.set()
        for lane in range(_NUM_LANES):
            self._queues[lane].put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        agent = self._agent
        if agent is not None and any(thread.is_alive() for thread in self._threads):
            agent.kill()
        self._may_leave.set()
        self._attaching.join(max(0.0, deadline - time.monotonic()))

    # ---- lane threads ----

    def _work(self, lane: int) -> None:
        if lane == _PUT:
            lower_priority()
        slots = self.slots.get_slots(lane)
        while (item := self._queues[lane].get()) is not None:
            job, transfer = item
            with self._lock:
                if job.state is not JobState.QUEUED:
                    continue
                job.state = JobState.BEGUN
            error = self._run(job, lane, slots)
            if transfer is not None:
                self._mover.end_elsewhere(transfer, error, wake=isinstance(job, Get))

    def _run(self, job: StoreJob, lane: int, slots: range) -> Exception | None:
        agent = self._agent
        try:
            if agent is None or not self.is_attached:
                raise StoreUnavailable("the store is detached")
            job.run(self, lambda request: agent.call(lane, request, CALL_TIMEOUT_S), slots)
        except StoreUnavailable as error:
            if agent is not None and agent is self._agent:
                self._trouble = error
                self._has_trouble.set()
            return error
        except Exception as error:
            logger.exception("store_job_failed")
            return error
        return None

    # ---- "store-attach" thread ----

    def _attach(self) -> None:
        try:
            populate(self._memory)
            self._stay_attached()
        finally:
            os.close(self._memory_fd)

    def _stay_attached(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._is_closing.is_set():
            agent: StoreAgent | None = None
            try:
                agent = StoreAgent(
                    *(self._address, self._memory_fd, self.slots.num_bytes),
                    [_NICENESS[lane] for lane in range(_NUM_LANES)],
                )
                agent.wait_attached(ATTACH_TIMEOUT_S)
                self._has_trouble.clear()
                self._trouble = None
                self._set(agent, True)
                retry_s = FIRST_RETRY_S
                self._watch(agent)
                self._may_leave.wait()
                agent.leave()
                return
            except StoreUnavailable as error:
                self._report(error, retry_s)
            self._set(None, False)
            if agent is not None:
                agent.kill()
                agent.leave()
            self._is_closing.wait(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _watch(self, agent: StoreAgent) -> None:
        """Returns when the client is closed. Raises: StoreUnavailable when the agent is lost."""
        while True:
            self._has_trouble.wait(CHECK_S)
            if self._is_closing.is_set():
                return
            if not agent.is_alive:
                raise self._trouble or StoreUnavailable(agent.last_words)
            if self._has_trouble.is_set():
                self._has_trouble.clear()
                self._outlast(agent, self._trouble or StoreUnavailable("unknown"))
                self._trouble = None

    def _outlast(self, agent: StoreAgent, error: StoreUnavailable) -> None:
        """Waits until the store's master answers again. Raises: StoreUnavailable."""
        retry_s = FIRST_RETRY_S
        self._report(error, retry_s)
        self._set(agent, False)
        while not self._is_closing.wait(retry_s):
            retry_s = min(2 * retry_s, LAST_RETRY_S)
            (code,) = agent.call(_ASK, Request(Op.EXIST, [self.prefix]), CALL_TIMEOUT_S)
            if code >= 0:
                self._has_trouble.clear()
                self._set(agent, True)
                return
            logger.info("store_still_detached code=%d retry_s=%g", code, retry_s)

    def _set(self, agent: StoreAgent | None, is_attached: bool) -> None:
        self._agent = agent
        if is_attached != self.is_attached:
            self.is_attached = is_attached
            self.generation += 1
            if is_attached:
                logger.info(
                    "store_attached master=%s segment_bytes=%d",
                    *(self._address.master_server_address, self._address.segment_size),
                )
            with contextlib.suppress(RuntimeError):
                self._on_change()

    def _report(self, error: StoreUnavailable, retry_s: float) -> None:
        self.num_detachments += 1
        logger.error(
            "store_detached master=%s error=%r retry_s=%g",
            *(self._address.master_server_address, str(error), retry_s),
        )
