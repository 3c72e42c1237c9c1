"""Feeds inputs to one target and stops at the first that does what it must not.

Three things are findings: an exception that the target did not declare, more memory than the input
allows, and more processor time than `MAX_CPU_S`. Memory is Python's own (tracemalloc) per input,
and the peak of the whole process over many, which sees what native code allocates.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import threading
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

MAX_CPU_S = 2.0
MAX_GROWTH_BYTES = 256 << 20
"""Of the process, from first to last input."""
_GROWTH_CHECK = 1024


class Target:
    """One parser, or a few that belong together. May be used by one run."""

    name: str
    traces_memory = True
    """False: only the peak of the process is looked at, for what would take too long else."""

    def make(self, rng: random.Random) -> Any:
        """The next input: any value with a useful `repr`."""
        raise NotImplementedError

    def feed(self, data: Any) -> None:
        """Hands it to the parser; what is declared is caught here, all else gets out."""
        raise NotImplementedError

    def allowed_bytes(self, data: Any) -> int:
        """What the parser may allocate for it at a time."""
        raise NotImplementedError

    def close(self) -> None:
        """After the last input."""


class Finding(Exception):
    """An input that got through where it should not; the message has it whole."""


class Hang(BaseException):
    """Not an Exception, so that nothing on its way takes it for an error of its own."""


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    num_inputs: int
    seconds: float
    peak_bytes: int
    """The most that one input had allocated."""


def run_target(
    target: Target, seed: int, *, num_inputs: int | None = None, max_s: float | None = None
) -> Run:
    """Feeds inputs until there were so many or the time is over. For the main thread.

    Raises: Finding.
    """
    rng = random.Random(seed)
    started = time.monotonic()
    memory_before = _peak_memory_bytes()
    count = peak_bytes = 0
    with contextlib.closing(target), _measuring(target.traces_memory):
        while num_inputs is None or count < num_inputs:
            if max_s is not None and time.monotonic() - started > max_s:
                break
            data = target.make(rng)
            peak_bytes = max(peak_bytes, _feed(target, data))
            count += 1
            if count % _GROWTH_CHECK == 0:
                growth = _peak_memory_bytes() - memory_before
                if growth > MAX_GROWTH_BYTES:
                    raise Finding(
                        f"{target.name}: the process grew by {growth} bytes within "
                        f"{count} inputs of seed {seed}"
                    )
    return Run(target.name, count, time.monotonic() - started, peak_bytes)


def _feed(target: Target, data: Any) -> int:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
    try:
        target.feed(data)
    except Hang:
        raise Finding(_report(target, data, f"more than {MAX_CPU_S} s")) from None
    except Exception as error:
        what = "".join(traceback.format_exception(error))
        raise Finding(_report(target, data, what)) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    allocated = tracemalloc.get_traced_memory()[1] - before
    if allocated > target.allowed_bytes(data):
        raise Finding(_report(target, data, f"{allocated} bytes allocated"))
    return allocated


def _report(target: Target, data: Any, what: str) -> str:
    try:
        shown = repr(data)
    except RecursionError:
        shown = "(too deep to be shown: see the traceback)"
    return f"{target.name}: {what}\ninput: {shown}"


@contextlib.contextmanager
def _measuring(traces_memory: bool) -> Iterator[None]:
    def hang(signum: int, frame: FrameType | None) -> None:
        raise Hang

    assert threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGVTALRM, hang)
    was_tracing = tracemalloc.is_tracing()
    if traces_memory:
        tracemalloc.start()
    try:
        yield
    finally:
        if not was_tracing:
            tracemalloc.stop()
        signal.signal(signal.SIGVTALRM, previous)


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
