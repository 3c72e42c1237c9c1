"""What a negative code of the store's client means to a worker. Pure.

The numbers are those of Mooncake Store 0.3 (`ErrorCode` in its `types.h`); a code that is not known
here fails its block and nothing else.
"""

from __future__ import annotations

import enum


class StoreOutcome(enum.Enum):
    """Of one block."""

    DONE = "done"
    ABSENT = "absent"
    """Never there, or evicted."""
    FULL = "full"
    """The pool has no room, or no memory at all."""
    UNREACHABLE = "unreachable"
    """The store's master does not answer: nothing else will work either."""
    CORRUPT = "corrupt"
    """Not the bytes that were put."""
    FAILED = "failed"


_ALREADY_THERE = -705
"""Of a put: somebody was first."""
_NO_AVAILABLE_HANDLE = -200
_NOT_THERE = (-702, -703, -704, -707, -710, -712)
"""OBJECT_NOT_FOUND; replicas that are not whole yet, or gone; a lease that ended before all was
read, after which the bytes may be another object's."""
_UNREACHABLE = (-900, -901)
"""RPC_FAIL, RPC_TIMEOUT."""


def outcome_of(code: int) -> StoreOutcome:
    """`code` >= 0 is DONE."""
    if code >= 0 or code == _ALREADY_THERE:
        return StoreOutcome.DONE
    if code == _NO_AVAILABLE_HANDLE:
        return StoreOutcome.FULL
    if code in _NOT_THERE:
        return StoreOutcome.ABSENT
    if code in _UNREACHABLE:
        return StoreOutcome.UNREACHABLE
    return StoreOutcome.FAILED
