"""The cache's books for two threads: the engine's, and that which serves peers.

The books are plain data for one thread at a time. The engine holds them but for when it computes or
sleeps, and those are the moments when it has no use for them. Others have work of microseconds to
do there, and must neither keep the engine waiting nor wait for a step of a long prompt to end:

    nobody holds them    whoever submits work does it, at once
    the engine does      it does the work itself, before it lets go

So nobody blocks on anybody, and no order of threads' priorities can keep work from being done: a
lock alone would be free only while the cores are taken by the step, when a thread of low priority
does not run. (Hendler et al., "Flat combining and the synchronization-parallelism tradeoff", 2010.)
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator


class SharedBooks:
    """`hold` and `pause` are for the engine's thread, `submit` is for any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """The books are the caller's."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._let_go()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within `hold`: they are not, for as long."""
        self._let_go()
        try:
            yield
        finally:
            self._lock.acquire()

    def submit(self, work: Callable[[], None]) -> None:
        """Has `work` done with the books, on this thread or soon on the one that holds them.

        `work` is short, and raises nothing.
        """
        self._work.put(work)
        self._do_waiting()

    def _let_go(self) -> None:
        self._drain()
        self._lock.release()
        # What was submitted between the two, by somebody who saw that they were held.
        self._do_waiting()

    def _do_waiting(self) -> None:
        while not self._work.empty() and self._lock.acquire(blocking=False):
            self._drain()
            self._lock.release()

    def _drain(self) -> None:
        while True:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            work()
