"""Slots of the device tier: reference counts, the free queue, and the names of full blocks.

Every block is in exactly one of three states:

    used          ref count >= 1, in no queue; named once it is full and committed
    cached        ref count 0, named, in the free queue: found by its hash until it is evicted
    free          ref count 0, no name, in the free queue

Rules:
 1. A named block is never written again.
 2. At most one block bears a name; a block computed twice keeps its second copy unnamed.
 3. The free queue is evicted from its head. Unnamed blocks join at the head, cached ones at the
    tail, and the blocks of one sequence join last block first: the tail of a chain goes before its
    head, since a head without its tail is useful and a tail without its head is not.
 4. What a peer was given goes before the other cached blocks: the cluster has it twice. A request
    that uses it here makes it a block like others.

Pure bookkeeping: no bytes move here, and nothing waits.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, Protocol

from xllm.protocol import BlockHash


class BlockEventKind(enum.Enum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


class BlockEvent(NamedTuple):
    """What the rest of the cluster may want to know of one tier's contents; made for each block,
    on the engine's thread, so it is cheap."""

    kind: BlockEventKind
    hash: BlockHash | None = None
    """None only for CLEARED."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    num_blocks: int
    num_used: int
    num_cached: int
    num_evictions: int


class BlockObserver(Protocol):
    """Takes what histograms of one tier are made of; called synchronously."""

    def block_reused(self, gap_s: float) -> None:
        """Time since the block's last use, or since it came in."""
        ...

    def block_evicted(self, lifetime_s: float, idle_s: float) -> None: ...


class BlockPool:
    """`num_blocks` equal slots. All methods are synchronous and for one thread."""

    def __init__(
        self,
        num_blocks: int,
        on_evict: Callable[[BlockHash, int], None] = lambda block_hash, block_id: None,
        *,
        observer: BlockObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_blocks = num_blocks
        self.on_evict = on_evict
        """`on_evict(hash, block)` is called when a cached block gives way to another, before
        anybody may write to it."""
        self._observer = observer
        self._clock = clock
        self._named_at = [0.0] * num_blocks
        self._used_at = [0.0] * num_blocks
        """Last committed, or found by a request."""
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._lent: OrderedDict[int, None] = OrderedDict()
        """The part of the free queue that rule 4 is about: after the unnamed blocks, before the
        others."""
        self._by_hash: dict[BlockHash, int] = {}
        self._held: set[BlockHash] = set()
        self._events: list[BlockEvent] = []
        self._num_cached = 0
        self._num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free) + len(self._lent)

    def lookup(self, block_hash: BlockHash) -> int | None:
        """The block that bears this name; valid until the next `allocate`, unless acquired."""
        return self._by_hash.get(block_hash)

    def hash_of(self, block_id: int) -> BlockHash | None:
        return self._hashes[block_id]

    def is_used(self, block_id: int) -> bool:
        return self._ref_counts[block_id] > 0

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Takes one more reference to named or used blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                assert self._hashes[block_id] is not None, "a free block is not acquired by id"
                if block_id in self._lent:
                    del self._lent[block_id]
                else:
                    del self._free[block_id]
                self._num_cached -= 1
            self._ref_counts[block_id] += 1

    def observe_reuse(self, block_ids: Iterable[int]) -> None:
        """A request goes on after these named blocks."""
        now = self._clock()
        for block_id in block_ids:
            if self._observer is not None:
                self._observer.block_reused(now - self._used_at[block_id])
            self._used_at[block_id] = now

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Fresh unnamed blocks with one reference each, or None if there are too few.

        Evicts cached blocks, the least recently used first.
        """
        if num_blocks > self.num_free:
            return None
        block_ids = []
        for _ in range(num_blocks):
            block_id = self._next_free()
            self._drop_name(block_id)
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def release(self, block_ids: Sequence[int], *, has_peer: bool = False) -> None:
        """Gives one reference back for each block of a sequence, in the sequence's order.

        `has_peer`: the reference was for giving them to a peer, which has them now.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            assert count >= 0, "released more often than acquired"
            self._ref_counts[block_id] = count
            if count > 0:
                continue
            if self._hashes[block_id] is None:
                self._free[block_id] = None
                self._free.move_to_end(block_id, last=False)
                continue
            self._num_cached += 1
            if has_peer:  # block after block, as they were sent: the tail is to go first
                self._lent[block_id] = None
                self._lent.move_to_end(block_id, last=False)
            else:
                self._free[block_id] = None

    def hold(self, names: Iterable[BlockHash]) -> None:
        """Keeps these blocks, whenever they are here, by a reference until `unhold`."""
        for name in names:
            if name not in self._held:
                self._held.add(name)
                if name in self._by_hash:
                    self.acquire((self._by_hash[name],))

    def unhold(self, names: Iterable[BlockHash]) -> None:
        for name in names:
            if name in self._held:
                self._held.remove(name)
                if name in self._by_hash:
                    self.release((self._by_hash[name],))

    @property
    def held_block_ids(self) -> list[int]:
        """Blocks that have a reference because of `hold`."""
        return [self._by_hash[name] for name in self._held if name in self._by_hash]

    def commit(self, block_id: int, block_hash: BlockHash) -> bool:
        """Names a full block; False: another block bears that name already."""
        assert self._ref_counts[block_id] > 0, "only a used block is committed"
        assert self._hashes[block_id] is None, "a block is committed once"
        if block_hash in self._by_hash:
            return False
        self._hashes[block_id] = block_hash
        self._by_hash[block_hash] = block_id
        if block_hash in self._held:
            self._ref_counts[block_id] += 1
        self._named_at[block_id] = self._used_at[block_id] = self._clock()
        self._events.append(BlockEvent(BlockEventKind.STORED, block_hash))
        return True

    def clear(self) -> int:
        """Forgets every cached block, and the names of used ones; returns how many names went."""
        num_cleared = len(self._by_hash)
        held = self.held_block_ids
        for block_id in self._by_hash.values():
            self._hashes[block_id] = None
        self._by_hash.clear()
        self._free.update(self._lent)
        self._lent.clear()
        self._num_cached = 0
        self.release(held)
        self._events = [BlockEvent(BlockEventKind.CLEARED)]
        return num_cleared

    def coldest(self, limit: int) -> list[BlockHash]:
        """Names of up to `limit` cached blocks, in the order in which they would be evicted."""
        names = (self._hashes[block_id] for block_id in chain(self._lent, self._free))
        return list(islice((name for name in names if name is not None), limit))

    def next_victim_used_at(self) -> float | None:
        """When the block was last used that the next one will displace; None: there is room.

        Where nothing can be displaced, because all blocks are in use, that is now. What a peer has,
        too, is room.
        """
        if self._lent:
            return None
        if not self._free:
            return self._clock()
        block_id = next(iter(self._free))
        return None if self._hashes[block_id] is None else self._used_at[block_id]

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            num_blocks=self.num_blocks,
            num_used=self.num_blocks - self.num_free,
            num_cached=self._num_cached,
            num_evictions=self._num_evictions,
        )

    def check_invariants(self) -> None:
        """Re-derives everything from scratch; tests call it after each operation."""
        for block_id in range(self.num_blocks):
            assert self._ref_counts[block_id] >= 0
            assert (block_id in self._free) + (block_id in self._lent) == (
                self._ref_counts[block_id] == 0
            )
        named = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert named == self._by_hash
        assert len(named) == sum(h is not None for h in self._hashes)
        assert self._num_cached == sum(self._ref_counts[b] == 0 for b in named.values())
        assert all(self._hashes[block_id] is not None for block_id in self._lent)

    def check_references(self, expected: dict[int, int]) -> None:
        """`expected`: references by block as their owners count them; absent is none."""
        for block_id, count in enumerate(self._ref_counts):
            assert count == expected.get(block_id, 0), f"block {block_id}: {count} references"

    def _next_free(self) -> int:
        """Takes a block out of the free queue."""
        if self._lent and not (self._free and self._hashes[next(iter(self._free))] is None):
            return self._lent.popitem(last=False)[0]
        return self._free.popitem(last=False)[0]

    def _drop_name(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._by_hash[block_hash]
            self._events.append(BlockEvent(BlockEventKind.REMOVED, block_hash))
            self._num_cached -= 1
            self._num_evictions += 1
            if self._observer is not None:
                now = self._clock()
                self._observer.block_evicted(
                    now - self._named_at[block_id], now - self._used_at[block_id]
                )
            self.on_evict(block_hash, block_id)
