"""Which block a tier gives up next.

A policy orders the blocks of one tier from cold to hot; it knows nothing of pins or slots
(`tier.SlotTable` skips what it may not take). Blocks form chains, and a tail without its head is
worth nothing: a block is never hotter than its parent was when the block came in or was last
used with it, and of two equally hot blocks the deeper one goes first.

Every block has a heat on one clock that ticks once per insertion and use:

    lru       heat = time of the last use
    graded    heat = time of the last use + capacity * GRADES[times it was used again]

So under `graded` a block that proved useful outlives the others by a share of the time that a block
stays in the cache anyway. Counts survive eviction in a list of ghosts as long as the tier, so a
block that comes back is known. On Mooncake's conversation trace this beats LRU at every size that
`scripts/bench cache` looks at; S3-FIFO (any queue split tried), CLOCK, 2Q's protected segment
and hit density (LHD) lose to LRU at some of them, mostly because a chat's next turn takes long
enough for its first reuse to miss a small probationary queue.

Pure, for one thread.
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from xllm.protocol import BlockHash


class EvictionPolicyName(enum.StrEnum):
    LRU = "lru"
    GRADED = "graded"


class EvictionPolicy(Protocol):
    """An order over the blocks of one tier."""

    def insert(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        """Adds a block that is not there, just colder than its parent if that is there."""
        ...

    def touch(self, chain: Sequence[BlockHash]) -> None:
        """Blocks of one chain, head first, were used; those not here are skipped."""
        ...

    def renew(self, block_hash: BlockHash) -> None:
        """Makes a block as hot as one just inserted, without counting a use."""
        ...

    def remove(self, block_hash: BlockHash) -> None:
        """The block has been evicted or dropped."""
        ...

    def clear(self) -> None: ...

    def coldest(self) -> BlockHash | None:
        """The next to go; None: empty."""
        ...

    def cold_first(self, limit: int) -> list[BlockHash]:
        """Up to `limit` blocks in the order in which they would go."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, block_hash: object) -> bool: ...

    def __iter__(self) -> Iterator[BlockHash]:
        """All blocks, in no order."""
        ...


GRADES = (0.0, 0.3, 0.8, 2.0)
"""Extra heat, in capacities, of a block used again 0, 1, 2..3, 4 or more times."""

_DEPTH_BITS = 24
_MAX_DEPTH = (1 << _DEPTH_BITS) - 1
"""A heat is `time << _DEPTH_BITS | (_MAX_DEPTH - depth)`: one integer, compared at once."""


class _Entry:
    __slots__ = ("depth", "heat", "num_uses")

    def __init__(self, num_uses: int) -> None:
        self.heat = 0
        self.depth = 0
        self.num_uses = num_uses


class HeatPolicy:
    """Both policies: a heap by heat whose outdated entries are dropped when they surface."""

    def __init__(
        self, capacity: int, grades: Sequence[float] = (0.0,), num_ghosts: int = 0
    ) -> None:
        """`capacity`: blocks of the tier. `grades`: extra heat in capacities, by grade of use."""
        self._bonuses = [int(capacity * grade) for grade in grades]
        self._num_ghosts = num_ghosts
        self._clock = 0
        self._entries: dict[BlockHash, _Entry] = {}
        self._heap: list[tuple[int, BlockHash]] = []
        self._ghosts: OrderedDict[BlockHash, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._entries

    def __iter__(self) -> Iterator[BlockHash]:
        return iter(self._entries)

    def insert(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        assert block_hash not in self._entries
        self._clock += 1
        num_uses = self._ghosts.pop(block_hash, -1) + 1
        entry = self._entries[block_hash] = _Entry(num_uses)
        self._heat(block_hash, entry, None if parent is None else self._entries.get(parent))

    def touch(self, chain: Sequence[BlockHash]) -> None:
        above: _Entry | None = None
        for block_hash in chain:
            entry = self._entries.get(block_hash)
            if entry is None:
                above = None
                continue
            # The tick counts blocks, as `capacity` does, so that grades mean the same for chains
            # of any length; the whole chain gets the first block's time.
            self._clock += 1
            entry.num_uses += 1
            self._heat(block_hash, entry, above)
            above = entry

    def renew(self, block_hash: BlockHash) -> None:
        self._clock += 1
        self._heat(block_hash, self._entries[block_hash], None)

    def remove(self, block_hash: BlockHash) -> None:
        entry = self._entries.pop(block_hash)
        if self._num_ghosts:
            self._ghosts[block_hash] = entry.num_uses
            if len(self._ghosts) > self._num_ghosts:
                self._ghosts.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()
        self._heap.clear()
        self._ghosts.clear()

    def coldest(self) -> BlockHash | None:
        heap = self._heap
        while heap:
            heat, block_hash = heap[0]
            if self._is_current(heat, block_hash):
                return block_hash
            heapq.heappop(heap)
        return None

    def cold_first(self, limit: int) -> list[BlockHash]:
        found: list[tuple[int, BlockHash]] = []
        while self._heap and len(found) < limit:
            item = heapq.heappop(self._heap)
            # A renewed heat may equal an older one, and be in the heap twice.
            if self._is_current(*item) and (not found or found[-1] != item):
                found.append(item)
        for item in found:
            heapq.heappush(self._heap, item)
        return [block_hash for _, block_hash in found]

    def _is_current(self, heat: int, block_hash: BlockHash) -> bool:
        entry = self._entries.get(block_hash)
        return entry is not None and entry.heat == heat

    def _heat(self, block_hash: BlockHash, entry: _Entry, parent: _Entry | None) -> None:
        grade = min(entry.num_uses.bit_length(), len(self._bonuses) - 1)
        time = self._clock + self._bonuses[grade]
        if parent is not None:
            time = min(time, parent.heat >> _DEPTH_BITS)
            entry.depth = min(parent.depth + 1, _MAX_DEPTH)
        entry.heat = time << _DEPTH_BITS | (_MAX_DEPTH - entry.depth)
        heapq.heappush(self._heap, (entry.heat, block_hash))
        if len(self._heap) > 4 * len(self._entries) + 64:
            self._heap = [(e.heat, h) for h, e in self._entries.items()]
            heapq.heapify(self._heap)


def make_eviction_policy(name: EvictionPolicyName, capacity: int) -> EvictionPolicy:
    """A policy for a tier of `capacity` blocks."""
    match name:
        case EvictionPolicyName.LRU:
            return HeatPolicy(capacity)
        case EvictionPolicyName.GRADED:
            return HeatPolicy(capacity, GRADES, num_ghosts=capacity)
