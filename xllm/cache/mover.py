"""The only code that starts transfers: threads that move bytes, and nothing else.

    engine thread                                   mover threads
    -------------                                   -------------
    start_load, try_start_store ──two queues──>     take_work, run
    take_ended                  <──one queue──      on_ended() wakes the engine

A `Transfer` is a function that touches bytes and no bookkeeping; what its end means is decided by
whoever started it, on the engine's thread, when `take_ended` brings it back. So slots and pins have
one owner, and a thread that hangs in a dead disk holds nothing but its transfer's slots.

Loads go before stores, since a request waits for them. Stores are bounded in number, queued and
running: one too many is refused, never waited for. A transfer that has begun is not interrupted;
`try_cancel` takes back one that has not.
"""

from __future__ import annotations

import enum
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from xllm.errors import TierIOError

logger = logging.getLogger(__name__)


class TransferState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    CANCELLED = "cancelled"


class Transfer:
    """One piece of work for a mover thread.

    `run` is called there, `on_end` on the engine's thread after it has returned or raised: then
    `error` is set, and `seconds` is what `run` took. A cancelled transfer ends without `on_end`.
    """

    __slots__ = ("error", "is_store", "on_end", "run", "seconds", "state")

    def __init__(
        self, run: Callable[[], None], on_end: Callable[[Transfer], None], *, is_store: bool
    ) -> None:
        self.run = run
        self.on_end = on_end
        self.is_store = is_store
        self.state = TransferState.QUEUED
        self.error: Exception | None = None
        self.seconds = 0.0


class Mover:
    """Threads and their queues. `take_work` and `run` are for its threads, and for tests."""

    def __init__(
        self,
        num_threads: int = 4,
        *,
        max_stores: int = 32,
        max_running_stores: int = 2,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_ended` is called on a mover thread after each transfer, and must be quick.

        With 0 threads nothing runs by itself: a test decides what happens when.
        """
        self._max_stores = max_stores
        self._max_running_stores = max_running_stores
        self._on_ended = on_ended
        self._condition = threading.Condition()
        self._loads: deque[Transfer] = deque()
        self._stores: deque[Transfer] = deque()
        self._num_stores = 0
        """Queued and running."""
        self._num_running_stores = 0
        self._is_closed = False
        self._ended: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"mover-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def can_store(self) -> bool:
        """Whether `try_start_store` would accept now."""
        return self._num_stores < self._max_stores and not self._is_closed

    def start_load(self, run: Callable[[], None], on_end: Callable[[Transfer], None]) -> Transfer:
        """Queues a transfer that somebody waits for."""
        assert not self._is_closed
        transfer = Transfer(run, on_end, is_store=False)
        with self._condition:
            self._loads.append(transfer)
            self._condition.notify()
        return transfer

    def try_start_store(
        self, run: Callable[[], None], on_end: Callable[[Transfer], None]
    ) -> Transfer | None:
        """Queues a transfer in the background; None: there are too many already."""
        transfer = Transfer(run, on_end, is_store=True)
        with self._condition:
            if not self.can_store:
                return None
            self._num_stores += 1
            self._stores.append(transfer)
            self._condition.notify()
        return transfer

    def try_cancel(self, transfer: Transfer) -> bool:
        """Takes back a transfer that has not begun; its `on_end` is not called then."""
        with self._condition:
            if transfer.state is not TransferState.QUEUED:
                return False
            transfer.state = TransferState.CANCELLED
            if transfer.is_store:
                self._stores.remove(transfer)
                self._num_stores -= 1
            else:
                self._loads.remove(transfer)
        return True

    def take_ended(self) -> list[Transfer]:
        """Transfers that have ended since the last call; the caller calls their `on_end`."""
        ended = []
        while True:
            try:
                ended.append(self._ended.get_nowait())
            except queue.Empty:
                return ended

    def close(self, timeout_s: float) -> bool:
        """Refuses stores, lets threads finish what is queued; False: some still run after that.

        The caller drains `take_ended` afterwards.
        """
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def take_work(self, *, wait: bool) -> Transfer | None:
        """The next transfer to run, which is RUNNING from now on; None: nothing, or closed."""
        with self._condition:
            while True:
                if self._loads:
                    transfer = self._loads.popleft()
                elif self._stores and self._num_running_stores < self._max_running_stores:
                    transfer = self._stores.popleft()
                    self._num_running_stores += 1
                elif wait and not (self._is_closed and not self._stores):
                    self._condition.wait()
                    continue
                else:
                    return None
                transfer.state = TransferState.RUNNING
                return transfer

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
        with self._condition:
            transfer.state = TransferState.ENDED
            if transfer.is_store:
                self._num_stores -= 1
                self._num_running_stores -= 1
                if self._stores or self._is_closed:
                    self._condition.notify_all()
        self._ended.put(transfer)
        self._on_ended()

    def _work(self) -> None:
        while (transfer := self.take_work(wait=True)) is not None:
            self.run(transfer)
