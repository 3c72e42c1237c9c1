"""The only code that starts transfers: threads that move bytes, and nothing else.

    engine thread                                   mover threads
    -------------                                   -------------
    start_load, try_start_store ──two queues──>     take_work, run
    take_ended                  <──one queue──      on_ended() wakes the engine

A `Transfer` is a function that touches bytes and no bookkeeping; what its end means is decided by
whoever started it, on the engine's thread, when `take_ended` brings it back. So slots and pins have
one owner, and a thread that hangs in a dead disk holds nothing but its transfer's slots.

A fetch from a peer is moved by a thread of its own (`peer_client.py`), and comes back by the same
queue: `open_elsewhere`, `end_elsewhere`.

Somebody waits for a load, nobody for a store. So stores have threads of their own, of the lowest
priority, which run when the cores have nothing else to do; and they are bounded in number: one too
many is refused, never waited for. A transfer that has begun is not interrupted; `try_cancel` takes
back one that has not.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from xllm.cache.threads import lower_priority
from xllm.errors import TierIOError

logger = logging.getLogger(__name__)


class TransferState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    CANCELLED = "cancelled"


class TransferGroup:
    """Transfers whose ends are of interest together: the engine is woken up for the last one."""

    __slots__ = ("num_left",)

    def __init__(self) -> None:
        self.num_left = 0


class Transfer:
    """One piece of work for a mover thread.

    `run` is called there, `on_end` on the engine's thread after it has returned or raised: then
    `error` is set, and `seconds` is what `run` took. A cancelled transfer ends without `on_end`.
    """

    __slots__ = ("cancel", "error", "group", "is_store", "on_end", "run", "seconds", "state")

    def __init__(
        self,
        run: Callable[[], None],
        on_end: Callable[[Transfer], None],
        *,
        is_store: bool,
        group: TransferGroup | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        """`cancel`: of one that is done elsewhere; whether it was taken back in time."""
        self.run = run
        self.cancel = cancel
        self.on_end = on_end
        self.is_store = is_store
        self.group = group
        self.state = TransferState.QUEUED
        self.error: Exception | None = None
        self.seconds = 0.0


class Mover:
    """Threads and their queues. `take_work` and `run` are for its threads, and for tests."""

    def __init__(
        self,
        num_threads: int = 4,
        *,
        num_store_threads: int = 2,
        max_stores: int = 32,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`num_threads`: for loads. `on_ended` is called on a mover thread after each transfer, of
        a group after the last, and must be quick.

        With 0 threads nothing runs by itself: a test decides what happens when.
        """
        self._max_stores = max_stores
        self._on_ended = on_ended
        self._lock = threading.Lock()
        self._has_load = threading.Condition(self._lock)
        self._has_store = threading.Condition(self._lock)
        self._loads: deque[Transfer] = deque()
        self._stores: deque[Transfer] = deque()
        self._num_stores = 0
        """Queued and running."""
        self._is_closed = False
        self._ended: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"{name}-{i}", daemon=True)
            for work, name, count in (
                (self._run_loads, "load", num_threads),
                (self._run_stores, "store", num_store_threads if num_threads else 0),
            )
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def can_store(self) -> bool:
        """Whether `try_start_store` would accept now."""
        return self._num_stores < self._max_stores and not self._is_closed

    def start_load(
        self,
        run: Callable[[], None],
        on_end: Callable[[Transfer], None],
        group: TransferGroup | None = None,
    ) -> Transfer:
        """Queues a transfer that somebody waits for, maybe together with others of a group."""
        assert not self._is_closed
        transfer = Transfer(run, on_end, is_store=False, group=group)
        with self._lock:
            if group is not None:
                group.num_left += 1
            self._loads.append(transfer)
            self._has_load.notify()
        return transfer

    def open_elsewhere(
        self,
        on_end: Callable[[Transfer], None],
        cancel: Callable[[], bool],
        group: TransferGroup | None = None,
    ) -> Transfer:
        """A transfer that another thread does, who calls `end_elsewhere` then.

        `cancel` is what `try_cancel` asks; after True, `end_elsewhere` must not be called.
        """
        transfer = Transfer(_nothing, on_end, is_store=False, group=group, cancel=cancel)
        with self._lock:
            if group is not None:
                group.num_left += 1
        return transfer

    def end_elsewhere(self, transfer: Transfer, error: Exception | None, *, wake: bool) -> None:
        """On any thread. `wake`: the engine should look at it though others of the group go on."""
        transfer.error = error
        with self._lock:
            is_last = self._report(transfer)
        if is_last or wake:
            self._on_ended()

    def try_start_store(
        self, run: Callable[[], None], on_end: Callable[[Transfer], None]
    ) -> Transfer | None:
        """Queues a transfer in the background; None: there are too many already."""
        transfer = Transfer(run, on_end, is_store=True)
        with self._lock:
            if not self.can_store:
                return None
            self._num_stores += 1
            self._stores.append(transfer)
            self._has_store.notify()
        return transfer

    def try_cancel(self, transfer: Transfer) -> bool:
        """Takes back a transfer that has not begun; its `on_end` is not called then."""
        is_elsewhere = transfer.cancel is not None
        if transfer.cancel is not None and not transfer.cancel():
            return False
        with self._lock:
            if transfer.state is not TransferState.QUEUED:
                return False
            transfer.state = TransferState.CANCELLED
            if transfer.group is not None:
                transfer.group.num_left -= 1
            if is_elsewhere:
                return True
            if transfer.is_store:
                self._stores.remove(transfer)
                self._num_stores -= 1
            else:
                self._loads.remove(transfer)
        return True

    def take_ended(self, wait_s: float = 0.0) -> list[Transfer]:
        """Transfers that have ended since the last call; the caller calls their `on_end`.

        Waits so long for the first one.
        """
        ended = []
        if wait_s > 0:
            with contextlib.suppress(queue.Empty):
                ended.append(self._ended.get(timeout=wait_s))
        while True:
            try:
                ended.append(self._ended.get_nowait())
            except queue.Empty:
                return ended

    def close(self, timeout_s: float) -> bool:
        """Refuses stores, lets threads finish what is queued; False: some still run after that.

        What was not begun in that time ends with an error. The caller drains `take_ended`
        afterwards.
        """
        with self._lock:
            self._is_closed = True
            self._has_load.notify_all()
            self._has_store.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            while self._loads or self._stores:
                transfer = (self._loads or self._stores).popleft()
                transfer.state = TransferState.ENDED
                transfer.error = TimeoutError("the mover was closed before it began")
                self._ended.put(transfer)
        return not any(thread.is_alive() for thread in self._threads)

    def take_work(self) -> Transfer | None:
        """The next transfer to run, which is RUNNING from now on: loads first."""
        with self._lock:
            for waiting in (self._loads, self._stores):
                if waiting:
                    return self._begin(waiting)
        return None

    def run(self, transfer: Transfer) -> None:
        """Runs a transfer that `take_work` gave out, and reports its end."""
        started = time.perf_counter()
        try:
            transfer.run()
        except TierIOError as error:
            transfer.error = error
        except Exception as error:
            logger.exception("transfer_failed")
            transfer.error = error
        transfer.seconds = time.perf_counter() - started
        with self._lock:
            self._num_stores -= transfer.is_store
            is_last = self._report(transfer)
        if is_last:
            self._on_ended()

    def _report(self, transfer: Transfer) -> bool:
        """With the lock held: it has ended. -> whether it is the last one of its group."""
        transfer.state = TransferState.ENDED
        self._ended.put(transfer)  # before others of the group can see that none is left
        if transfer.group is None:
            return True
        transfer.group.num_left -= 1
        return transfer.group.num_left == 0

    def _begin(self, waiting: deque[Transfer]) -> Transfer:
        transfer = waiting.popleft()
        transfer.state = TransferState.RUNNING
        return transfer

    def _run_loads(self) -> None:
        self._work(self._loads, self._has_load)

    def _run_stores(self) -> None:
        lower_priority()
        self._work(self._stores, self._has_store)

    def _work(self, waiting: deque[Transfer], has_some: threading.Condition) -> None:
        while True:
            with self._lock:
                while not waiting:
                    if self._is_closed:
                        return
                    has_some.wait()
                transfer = self._begin(waiting)
            self.run(transfer)


def _nothing() -> None:
    """What a mover thread has to do for a transfer that is done elsewhere."""
