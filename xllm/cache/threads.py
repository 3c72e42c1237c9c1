"""Threads that leave the cores to others."""

from __future__ import annotations

import os
import sys
import threading

LOWEST_PRIORITY = 19
"""As `nice` has it: such a thread only gets what nobody else wants."""


def lower_priority(niceness: int = LOWEST_PRIORITY) -> None:
    """Of the calling thread, for good; where threads have no priority of their own, nothing."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
