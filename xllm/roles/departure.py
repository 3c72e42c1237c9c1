"""How a master leaves without a failed request: it says so, serves on, and ends when it is unused.

    /health says 503     load balancers send nothing new; who comes all the same is served, and told
                         to close its connection
    unused for QUIET_S   or the time is over: the process ends, as after SIGTERM

SIGTERM goes straight to the end: no new connections, and `--drain_timeout` for requests that run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

QUIET_S = 5.0
"""Without a request. Longer than most load balancers look away between two probes."""

_PERIOD_S = 0.1


class Drained(Exception):
    """An operator has drained the process: it ends."""


class Departure:
    """`num_running`: requests that this master serves now."""

    def __init__(self, num_running: Callable[[], float], timeout_s: float) -> None:
        self._num_running = num_running
        self._timeout_s = timeout_s
        self._asked_for = asyncio.Event()

    @property
    def is_leaving(self) -> bool:
        return self._asked_for.is_set()

    def begin(self, timeout_s: float | None) -> float:
        """Idempotent. Returns the seconds after which the process ends in any case, but for what
        runs then: that gets `--drain_timeout`."""
        if timeout_s is not None:
            self._timeout_s = timeout_s
        if not self.is_leaving:
            logger.info("master_draining timeout_s=%g", self._timeout_s)
        self._asked_for.set()
        return self._timeout_s

    async def wait(self) -> None:
        """Returns when it was asked for and nobody uses this master, or the time is over."""
        await self._asked_for.wait()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._timeout_s
        used_at = loop.time()
        while loop.time() < ends_at and loop.time() - used_at < QUIET_S:
            if self._num_running():
                used_at = loop.time()
            await asyncio.sleep(_PERIOD_S)
