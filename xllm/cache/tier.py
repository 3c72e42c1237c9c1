"""The contract of a tier below the device, and the bookkeeping that all of them share. Pure.

A tier is an array of equal slots. For each slot:

    ABSENT ──prepare_store──> RESERVED ──complete_store──> READY ──evict, discard, clear──> ABSENT
       ^                         │
       └────── aborted ──────────┘

Rules:
 1. `prepare_` and `complete_` come in pairs, whatever happens in between: a store's slot stays
    RESERVED until its transfer has really ended, however long ago everybody lost interest in it.
 2. READY is left only at pin count 0. `prepare_load` pins, `complete_load` unpins. A name that is
    held (`hold`) pins its block for as long as it is here.
 3. A block that is discarded or cleared while somebody fills or reads its slot is *dropped*: nobody
    finds it from then on, and its slot becomes free when the last of them completes.
 4. At most one slot bears a name. A lookup answers HIT for READY, PENDING for RESERVED, else MISS.
 5. Everything is synchronous and for one thread. Transfers run elsewhere and know slots, not names.

What is not here: bytes (`host_tier.py`, `disk_tier.py`), and who decides what to move (`tiers.py`).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from xllm.cache.block_pool import BlockEvent, BlockEventKind, BlockObserver
from xllm.cache.eviction import EvictionPolicy
from xllm.protocol import BlockHash


class TierName(enum.StrEnum):
    """From fast to slow; also the label of metrics and the key in `cached_tokens_by_tier`."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


LOWER_TIERS: tuple[TierName, ...] = (TierName.HOST, TierName.DISK, TierName.REMOTE)


class Lookup(enum.Enum):
    MISS = "miss"
    PENDING = "pending"
    """On its way in: there soon, or not at all."""
    HIT = "hit"


class SlotState(enum.Enum):
    ABSENT = "absent"
    RESERVED = "reserved"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A READY block: where it is and what its bytes must hash to."""

    slot: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class TableStatistics:
    num_slots: int
    num_ready: int
    num_reserved: int
    num_pinned: int
    num_stores: int
    num_aborts: int
    num_evictions: int
    num_refusals: int
    """Stores for which no slot was free or evictable."""


class _Slot:
    __slots__ = (
        "checksum",
        "dropped",
        "hash",
        "num_pins",
        "parent",
        "state",
        "stored_at",
        "used_at",
    )

    def __init__(self) -> None:
        self.state = SlotState.ABSENT
        self.hash: BlockHash | None = None
        self.parent: BlockHash | None = None
        self.checksum = b""
        self.num_pins = 0
        self.dropped = False
        self.stored_at = 0.0
        self.used_at = 0.0


class SlotTable:
    """Names, states and pins of one tier's slots."""

    def __init__(
        self,
        num_slots: int,
        policy: EvictionPolicy,
        *,
        clock: Callable[[], float],
        observer: BlockObserver | None = None,
    ) -> None:
        """`policy` is empty and belongs to the table from now on: it holds the READY blocks."""
        self.num_slots = num_slots
        self._policy = policy
        self._clock = clock
        self._observer = observer
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = deque(range(num_slots))
        self._by_hash: dict[BlockHash, int] = {}
        self._held: set[BlockHash] = set()
        self._num_reserved = 0
        self._events: list[BlockEvent] = []
        self._num_pinned = 0
        """READY, not dropped, pin count > 0."""
        self._num_stores = 0
        self._num_aborts = 0
        self._num_evictions = 0
        self._num_refusals = 0

    def __len__(self) -> int:
        """READY blocks that can be found."""
        return len(self._policy)

    @property
    def num_free(self) -> int:
        """Slots that a store can have without evicting."""
        return len(self._free)

    def lookup(self, block_hash: BlockHash) -> Lookup:
        slot_id = self._by_hash.get(block_hash)
        if slot_id is None:
            return Lookup.MISS
        ready = self._slots[slot_id].state is SlotState.READY
        return Lookup.HIT if ready else Lookup.PENDING

    def parent_of(self, block_hash: BlockHash) -> BlockHash | None:
        """Of a block that is here or on its way; None also where it was not known."""
        return self._slots[self._by_hash[block_hash]].parent

    def parent_of_slot(self, slot_id: int) -> BlockHash | None:
        """As `parent_of`, for a slot that is not ABSENT, also if its block was dropped."""
        return self._slots[slot_id].parent

    def touch(self, chain: Sequence[BlockHash]) -> None:
        """Blocks of one chain, head first, were used by a request."""
        now = self._clock()
        for block_hash in chain:
            slot_id = self._by_hash.get(block_hash)
            if slot_id is not None:
                slot = self._slots[slot_id]
                if self._observer is not None and slot.state is SlotState.READY:
                    self._observer.block_reused(now - slot.used_at)
                slot.used_at = now
        self._policy.touch(chain)

    def prepare_store(self, block_hash: BlockHash, parent: BlockHash | None) -> int | None:
        """Reserves a slot for a block that is not there, evicting if it has to.

        None: the block is there or on its way, or every slot is in use.
        """
        if block_hash in self._by_hash:
            return None
        if not self._free and not self._evict():
            self._num_refusals += 1
            return None
        slot_id = self._free.popleft()
        slot = self._slots[slot_id]
        slot.state = SlotState.RESERVED
        slot.hash = block_hash
        slot.parent = parent
        self._by_hash[block_hash] = slot_id
        self._num_reserved += 1
        return slot_id

    def complete_store(self, slot_id: int, checksum: bytes | None) -> bool:
        """The transfer into a RESERVED slot has ended: publishes the block, or frees the slot.

        `checksum`: of the bytes that are in the slot now; None: they are worth nothing.
        Returns whether the block can be found now; False also if it was dropped meanwhile.
        """
        slot = self._slots[slot_id]
        assert slot.state is SlotState.RESERVED, "a store is completed once"
        self._num_reserved -= 1
        if checksum is None or slot.dropped:
            self._num_aborts += 1
            if not slot.dropped:
                assert slot.hash is not None
                del self._by_hash[slot.hash]
            self._release(slot_id)
            return False
        self._publish(slot_id, checksum)
        self._num_stores += 1
        return True

    def restore(
        self, slot_id: int, block_hash: BlockHash, parent: BlockHash | None, checksum: bytes
    ) -> bool:
        """Publishes what an ABSENT slot was found to hold at start-up; False: not wanted.

        Called in the order in which the blocks were stored; `finish_restore` comes last.
        """
        slot = self._slots[slot_id]
        if block_hash in self._by_hash or slot.state is not SlotState.ABSENT:
            return False
        slot.hash = block_hash
        slot.parent = parent
        self._by_hash[block_hash] = slot_id
        self._publish(slot_id, checksum)
        return True

    def finish_restore(self) -> None:
        """Takes the restored slots out of the free list: once, not once a slot."""
        self._free = deque(i for i in self._free if self._slots[i].state is SlotState.ABSENT)

    def prepare_load(self, block_hash: BlockHash) -> StoredBlock | None:
        """Pins a READY block until `complete_load`; None: a miss, or still on its way in."""
        slot_id = self._by_hash.get(block_hash)
        if slot_id is None:
            return None
        slot = self._slots[slot_id]
        if slot.state is not SlotState.READY:
            return None
        self._pin(slot)
        return StoredBlock(slot_id, slot.checksum)

    def complete_load(self, slot_id: int) -> None:
        """Gives one pin back."""
        slot = self._slots[slot_id]
        assert slot.num_pins > 0, "a load is completed once"
        self._unpin(slot)
        if slot.dropped and slot.num_pins == 0:
            self._release(slot_id)

    def hold(self, names: Iterable[BlockHash]) -> None:
        """Keeps these blocks from being evicted, whenever they are here, until `unhold`."""
        for name in names:
            if name not in self._held:
                self._held.add(name)
                if self.lookup(name) is Lookup.HIT:
                    self._pin(self._slots[self._by_hash[name]])

    def unhold(self, names: Iterable[BlockHash]) -> None:
        for name in names:
            if name in self._held:
                self._held.remove(name)
                if self.lookup(name) is Lookup.HIT:
                    self._unpin(self._slots[self._by_hash[name]])

    def discard(self, block_hash: BlockHash) -> bool:
        """Drops a block, e.g. because its bytes are damaged; returns whether it was there."""
        slot_id = self._by_hash.get(block_hash)
        if slot_id is None:
            return False
        if self._slots[slot_id].state is SlotState.READY:
            self._events.append(BlockEvent(BlockEventKind.REMOVED, block_hash))
        self._drop(slot_id)
        return True

    def clear(self) -> int:
        """Drops every block; returns how many could be found before."""
        num_ready = len(self._policy)
        for slot_id in list(self._by_hash.values()):
            self._drop(slot_id)
        self._policy.clear()
        self._events = [BlockEvent(BlockEventKind.CLEARED)]
        return num_ready

    def cold_first(self, limit: int) -> list[BlockHash]:
        """Up to `limit` blocks, those that would be evicted soonest first, pinned ones included."""
        return self._policy.cold_first(limit)

    def next_victim_used_at(self) -> float | None:
        """When the block was last used that the next one will displace; None: there is room."""
        if self._free:
            return None
        victim = self._policy.coldest()
        return self._clock() if victim is None else self._slots[self._by_hash[victim]].used_at

    def hashes(self) -> list[BlockHash]:
        """Everything that can be found."""
        return list(self._policy)

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def statistics(self) -> TableStatistics:
        return TableStatistics(
            num_slots=self.num_slots,
            num_ready=len(self._policy),
            num_reserved=self._num_reserved,
            num_pinned=self._num_pinned,
            num_stores=self._num_stores,
            num_aborts=self._num_aborts,
            num_evictions=self._num_evictions,
            num_refusals=self._num_refusals,
        )

    def check_invariants(self) -> None:
        """Re-derives everything from the slots; tests call it after each operation."""
        free = set(self._free)
        assert len(free) == len(self._free)
        named: dict[BlockHash, int] = {}
        ready: set[BlockHash] = set()
        num_pinned = num_reserved = 0
        for slot_id, slot in enumerate(self._slots):
            assert (slot.state is SlotState.ABSENT) == (slot_id in free)
            num_reserved += slot.state is SlotState.RESERVED
            assert (slot.hash is None) == (slot.state is SlotState.ABSENT)
            assert slot.num_pins == 0 or slot.state is SlotState.READY
            assert not slot.dropped or slot.state is SlotState.RESERVED or slot.num_pins > 0
            if slot.hash is not None and not slot.dropped:
                assert slot.hash not in named
                named[slot.hash] = slot_id
                if slot.state is SlotState.READY:
                    ready.add(slot.hash)
                    num_pinned += slot.num_pins > 0
        assert named == self._by_hash
        assert ready == set(self._policy)
        assert num_pinned == self._num_pinned
        assert num_reserved == self._num_reserved

    def check_pins(self, expected: dict[int, int]) -> None:
        """`expected`: pins by slot as their owners count them; absent is none."""
        for slot_id, slot in enumerate(self._slots):
            is_held = slot.state is SlotState.READY and not slot.dropped and slot.hash in self._held
            assert slot.num_pins == expected.get(slot_id, 0) + is_held, f"slot {slot_id}"

    def _pin(self, slot: _Slot) -> None:
        slot.num_pins += 1
        if slot.num_pins == 1 and not slot.dropped:
            self._num_pinned += 1

    def _unpin(self, slot: _Slot) -> None:
        slot.num_pins -= 1
        if slot.num_pins == 0 and not slot.dropped:
            self._num_pinned -= 1

    def _publish(self, slot_id: int, checksum: bytes) -> None:
        slot = self._slots[slot_id]
        assert slot.hash is not None
        slot.state = SlotState.READY
        slot.checksum = checksum
        slot.stored_at = slot.used_at = self._clock()
        self._policy.insert(slot.hash, slot.parent)
        if slot.hash in self._held:
            self._pin(slot)
        self._events.append(BlockEvent(BlockEventKind.STORED, slot.hash))

    def _evict(self) -> bool:
        """Frees the coldest unpinned slot; False: there is none."""
        while len(self._policy) > self._num_pinned:
            victim = self._policy.coldest()
            assert victim is not None
            slot_id = self._by_hash[victim]
            slot = self._slots[slot_id]
            if slot.num_pins:
                # In use, so not cold: out of the way, else each eviction would pass it again.
                self._policy.renew(victim)
                continue
            now = self._clock()
            if self._observer is not None:
                self._observer.block_evicted(now - slot.stored_at, now - slot.used_at)
            self._events.append(BlockEvent(BlockEventKind.REMOVED, victim))
            self._num_evictions += 1
            self._drop(slot_id)
            return True
        return False

    def _drop(self, slot_id: int) -> None:
        """Takes the name away; the slot is free at once unless it is being filled or read."""
        slot = self._slots[slot_id]
        assert slot.hash is not None
        del self._by_hash[slot.hash]
        if slot.state is SlotState.READY:
            self._policy.remove(slot.hash)
            if slot.hash in self._held:
                self._unpin(slot)
            if slot.num_pins == 0:
                self._release(slot_id)
                return
            self._num_pinned -= 1
        slot.dropped = True

    def _release(self, slot_id: int) -> None:
        slot = self._slots[slot_id]
        slot.state = SlotState.ABSENT
        slot.hash = None
        slot.parent = None
        slot.checksum = b""
        slot.dropped = False
        self._free.append(slot_id)
