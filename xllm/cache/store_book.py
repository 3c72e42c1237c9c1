"""What a worker knows to be in the shared store. Pure, for the engine's thread.

Nobody lists what the store holds, and it evicts without telling: a name gets here when this worker
has put its block or was told that it is there, and leaves when the block turns out to be gone, or
when more recent names need the room. A name that is here and gone from the store costs computing
its block, which then is put again.

The events are what the cluster's index is told: any worker may load what one of them knows of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.protocol import BlockHash

MAX_NAMES = 1 << 17


class StoreBook:
    """Names, the least recently used first."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._names: OrderedDict[BlockHash, None] = OrderedDict()
        self._events: list[BlockEvent] = []

    def __len__(self) -> int:
        return len(self._names)

    def knows(self, name: BlockHash) -> bool:
        return name in self._names

    def add(self, names: Iterable[BlockHash]) -> None:
        """These are there."""
        for name in names:
            if name in self._names:
                self._names.move_to_end(name)
                continue
            if len(self._names) >= self._max_names:
                oldest, _ = self._names.popitem(last=False)
                self._events.append(BlockEvent(BlockEventKind.REMOVED, oldest))
            self._names[name] = None
            self._events.append(BlockEvent(BlockEventKind.STORED, name))

    def remove(self, names: Iterable[BlockHash]) -> None:
        """These are not, or not any more."""
        for name in names:
            if name in self._names:
                del self._names[name]
                self._events.append(BlockEvent(BlockEventKind.REMOVED, name))

    def touch(self, names: Iterable[BlockHash]) -> None:
        """A request used these."""
        for name in names:
            if name in self._names:
                self._names.move_to_end(name)

    def clear(self) -> int:
        """Nothing is known any more; returns how much was."""
        num_names = len(self._names)
        if num_names:
            self._names.clear()
            self._events = [BlockEvent(BlockEventKind.CLEARED)]
        return num_names

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check_invariants(self) -> None:
        assert len(self._names) <= self._max_names
