"""Threads that only get what nobody else wants of the cores."""

from __future__ import annotations

import os
import sys
import threading

LOWEST_PRIORITY = 19
"""As `nice` has it."""


def lower_priority() -> None:
    """Of the calling thread, for good; where threads have no priority of their own, nothing."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
