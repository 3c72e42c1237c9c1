"""What a tier holds, and what the index was told of it. Pure; blocks are short hashes.

held - published     dirty, or silent where the masters have no room for it
published - held     dirty
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice


class TierState:
    """One tier. What `take_` gives counts as published from then on."""

    __slots__ = ("cleared", "dirty", "held", "published", "silent")

    def __init__(self) -> None:
        self.held: dict[int, None] = {}
        self.published: set[int] = set()
        self.dirty: dict[int, None] = {}
        """In the order in which it happened, so the head of a chain before its tail."""
        self.silent: set[int] = set()
        """Held, and not published for want of room."""
        self.cleared = False
        """Since the last batch; what was published before is gone."""

    def store(self, block: int) -> None:
        self.held[block] = None
        self.dirty[block] = None

    def remove(self, block: int) -> None:
        self.held.pop(block, None)
        self.silent.discard(block)
        if block in self.published:
            self.dirty[block] = None
        else:
            self.dirty.pop(block, None)

    def clear(self) -> None:
        self.cleared = self.cleared or bool(self.published)
        self.held.clear()
        self.published.clear()
        self.dirty.clear()
        self.silent.clear()

    def take_removed(self, room: int) -> tuple[int, ...]:
        gone = (b for b in self.dirty if b not in self.held and b in self.published)
        removed = tuple(islice(gone, room))
        self.published.difference_update(removed)
        for block in removed:
            del self.dirty[block]
        return removed

    def take_stored(self, room: int, allowed: int, heat: Mapping[int, int]) -> tuple[int, ...]:
        """What came, the hottest first if not all of it fits into `room`; what the cluster does not
        want beyond `allowed` becomes silent."""
        fresh = [b for b in self.dirty if b in self.held and b not in self.published]
        if len(fresh) > min(room, allowed):
            fresh.sort(key=lambda block: -heat.get(block, 0))
        wanted = fresh[: max(0, allowed)]
        stored = tuple(wanted[: max(0, room)])
        self.silent.difference_update(stored)
        self.silent.update(fresh[len(wanted) :])
        self.published.update(stored)
        # What is held and was published already has come and gone and come: no news.
        self.dirty = {b: None for b in self.dirty if b not in self.held}
        self.dirty.update(dict.fromkeys(wanted[len(stored) :]))
        return stored

    def choose_anew(self, allowed: int, heat: Mapping[int, int]) -> int:
        """Publishes what is held, the hottest if that is more than `allowed`; returns how much."""
        chosen = list(self.held)
        if len(chosen) > allowed:
            chosen.sort(key=lambda block: -heat.get(block, 0))
        self.silent = set(chosen[max(0, allowed) :])
        self.published = set(chosen[: max(0, allowed)])
        self.dirty.clear()
        self.cleared = False
        return len(self.published)

    def check_invariants(self) -> None:
        assert self.held.keys() - self.published <= self.dirty.keys() | self.silent
        assert self.published - self.held.keys() <= self.dirty.keys()
        assert self.silent <= self.held.keys() - self.published
