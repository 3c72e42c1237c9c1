"""Which worker holds which block in which tier: the master's copy of the whole cluster. Pure.

    hash ──> mask of holders          4 bits per worker, one per tier: 1 << (4 * slot + tier)
    slot, tier ──> set of hashes      to forget a worker or a tier without a walk over all blocks

A hash is the first 8 bytes of a block's name as an int: `event_codec.short_hash`.

Blocks of the remote tier are in the shared store, of which a worker publishes what it knows. They
are near every worker that uses that store, so `match` leaves them out, and `store_gaps` says which
blocks of a prompt nobody knows to be there.

`match` walks the blocks of a prompt once, for all workers together. It carries one mask: for each
worker whose prefix is still unbroken, the bit of the fastest tier that holds the present block.
Along a prompt that mask seldom changes, since the blocks of a prefix tend to be where their
neighbours are, and only a change costs more than a look-up and a comparison: each bit that goes or
comes is the end or the start of a run of blocks in one tier of one worker.

Why like this. Of one million blocks over 64 workers, and 64 blocks against 32 workers that hold all
or a part of them, measured beside each other on one core; the matches only find where each prefix
ends:

    representation                          M events/s   us per match   bytes per block
    a set per worker and tier, match by
      `issuperset` and `takewhile`             5.4           34-50             70
    one dict of masks, and sets                2.7            2.5-4           112
    64 dicts of masks by hash bits, and sets   2.3            5.6-7           108

The sets alone are the quickest to change, but the match grows with workers times blocks: 512
workers that share a system prompt cost milliseconds. One dict stalls the loop while it grows: 38 ms
at 700,000 blocks, 82 ms at 1,400,000; so the masks are spread over many. A set per worker and tier
may stall, too: 3 ms at 80,000 blocks, 14 ms at 300,000, once each. Also rejected: a trie of chains,
because it must know parents, which events do not carry, and evictions leave holes in it; binary
search for the end of a prefix, because of the same holes; masks without the sets, which save 30
bytes per block, but then a worker that leaves costs a walk over everybody's blocks.

Masks are shared: blocks with the same holders have the same int, or 512 workers would cost 300
bytes per shared block. `_intern` is bounded and emptied when full; sharing is lost then, not truth.

Not here: epochs, sequence numbers, etcd (`roles/index_view.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TypeAlias

from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import NUM_TIERS, EventBatch, TierCode
from xllm.protocol import WorkerId

SLICE_BLOCKS = 1024
"""Blocks changed between two yields of the `_slices` methods: about 0.5 ms."""

TierCounts: TypeAlias = list[int]
"""Blocks of an unbroken prefix by `TierCode`, each counted in the fastest tier that holds it; their
sum is the length of the prefix."""

_NUM_SHARDS = 256
_SHARD_MASK = _NUM_SHARDS - 1
_MAX_INTERNED = 1 << 16
_MAX_VIEWS = 1 << 14


@dataclass(frozen=True, slots=True)
class IndexStatistics:
    num_workers: int
    num_blocks: int
    """Different ones."""
    num_copies: int
    """Blocks, counted once per worker and tier."""


class CacheIndex:
    """All methods are synchronous and for one thread.

    A `_slices` method yields between slices of its work, when anything but the same worker may be
    changed or matched; the worker's own changes have to wait until it is exhausted.
    """

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(_NUM_SHARDS)]
        self._slots: dict[WorkerId, int] = {}
        self._workers: list[WorkerId | None] = []
        """By slot."""
        self._free_slots: list[int] = []
        """A heap: low slots keep masks short."""
        self._held: list[list[set[int]]] = []
        """By slot and tier."""
        self._bits: list[int] = []
        """The mask of one holder, by slot and tier: one object that all blocks share."""
        self._ones = 0
        """The first bit of each slot."""
        self._num_in_store = 0
        """Blocks of the remote tier, once per worker."""
        self._intern: dict[int, int] = {}
        self._views: dict[int, tuple[int, int]] = {}
        """What `match` needs of a mask; bounded like `_intern`."""

    def apply(self, worker: WorkerId, batch: EventBatch) -> None:
        """What happened at a worker. Twice the same changes nothing more."""
        for _ in self.apply_slices(worker, batch):
            pass

    def apply_slices(self, worker: WorkerId, batch: EventBatch) -> Iterator[None]:
        slot = self._slot(worker)
        for section in batch.sections:
            if section.kind is BlockEventKind.CLEARED:
                yield from self._clear_slices(slot, section.tier)
                continue
            change = self._store if section.kind is BlockEventKind.STORED else self._remove
            hashes = section.hashes
            if len(hashes) <= SLICE_BLOCKS:
                change(slot, section.tier, hashes)
                yield
                continue
            for start in range(0, len(hashes), SLICE_BLOCKS):
                change(slot, section.tier, hashes[start : start + SLICE_BLOCKS])
                yield

    def clear(self, worker: WorkerId, tier: TierCode) -> None:
        """A worker's tier is empty."""
        for _ in self.clear_slices(worker, tier):
            pass

    def clear_slices(self, worker: WorkerId, tier: TierCode) -> Iterator[None]:
        slot = self._slots.get(worker)
        if slot is not None:
            yield from self._clear_slices(slot, tier)

    def remove_worker(self, worker: WorkerId) -> None:
        """A worker is gone, and all it held with it."""
        for _ in self.remove_worker_slices(worker):
            pass

    def remove_worker_slices(self, worker: WorkerId) -> Iterator[None]:
        """The worker is no longer matched from the first slice on, and unknown after the last."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        self._workers[slot] = None
        for tier in TierCode:
            yield from self._clear_slices(slot, tier)
        heapq.heappush(self._free_slots, slot)

    def match(self, hashes: Sequence[int]) -> dict[WorkerId, TierCounts]:
        """How much of a prompt each worker holds, from its first block on and without a gap.

        A block counts in whichever of its worker's tiers is fastest. Workers without the first
        block are not in the answer. What is only in the shared store is held by nobody.
        """
        shards = self._shards
        views = self._views
        present = first = alive = 0
        before = -1
        counts = [0] * len(self._bits)
        for position, block in enumerate(hashes):
            mask = shards[block & _SHARD_MASK].get(block, 0)
            if mask == before:
                continue
            before = mask
            fastest, workers = views.get(mask) or self._view(mask)
            if position == 0:
                present = first = fastest
                alive = workers
                continue
            alive &= workers
            following = fastest & alive
            changes = present ^ following
            if changes and not changes & (changes - 1):  # one bit: the usual case
                number = changes.bit_length() - 1
                counts[number] += position if present & changes else -position
            else:
                for number in _bit_numbers(present & changes):
                    counts[number] += position
                for number in _bit_numbers(following & changes):
                    counts[number] -= position
            present = following
            if not present:
                break
        for number in _bit_numbers(present):
            counts[number] += len(hashes)
        starts = [number & -NUM_TIERS for number in _bit_numbers(first)]
        names = self._workers
        return {
            worker: counts[start : start + NUM_TIERS]
            for start in starts
            if (worker := names[start // NUM_TIERS]) is not None
        }

    def store_gaps(self, hashes: Sequence[int]) -> list[int] | None:
        """Which blocks of a prompt, by position, no worker knows to be in the shared store; None:
        nobody knows of any."""
        if not self._num_in_store:
            return None
        shards = self._shards
        remote = self._ones << TierCode.REMOTE
        return [
            position
            for position, block in enumerate(hashes)
            if not shards[block & _SHARD_MASK].get(block, 0) & remote
        ]

    def holders(self, block: int) -> list[tuple[WorkerId, TierCode]]:
        """Everybody that holds one block, or knows it to be in the shared store."""
        mask = self._shards[block & _SHARD_MASK].get(block, 0)
        found = []
        for worker, slot in self._slots.items():
            nibble = mask >> slot * NUM_TIERS
            found += [(worker, tier) for tier in TierCode if nibble >> tier & 1]
        return found

    def num_held(self, worker: WorkerId) -> TierCounts:
        """A worker's blocks by tier."""
        slot = self._slots.get(worker)
        return [0] * NUM_TIERS if slot is None else [len(held) for held in self._held[slot]]

    def statistics(self) -> IndexStatistics:
        return IndexStatistics(
            num_workers=len(self._slots),
            num_blocks=sum(map(len, self._shards)),
            num_copies=sum(len(held) for tiers in self._held for held in tiers),
        )

    def check_invariants(self) -> None:
        """Re-derives everything from scratch; tests call it after each operation."""
        masks: dict[int, int] = {}
        for slot, tiers in enumerate(self._held):
            for tier, held in enumerate(tiers):
                for block in held:
                    masks[block] = masks.get(block, 0) | 1 << slot * NUM_TIERS + tier
        for number, shard in enumerate(self._shards):
            for block, mask in shard.items():
                assert block & _SHARD_MASK == number
                assert masks.pop(block) == mask
        assert not masks
        in_store = [tiers[TierCode.REMOTE] for tiers in self._held]
        assert self._num_in_store == sum(map(len, in_store))
        for worker, slot in self._slots.items():
            assert self._workers[slot] == worker
        assert sum(worker is not None for worker in self._workers) == len(self._slots)
        for slot in self._free_slots:
            assert self._workers[slot] is None
            assert not any(self._held[slot])
        assert all(mask is key or mask == key for key, mask in self._intern.items())

    def _slot(self, worker: WorkerId) -> int:
        slot = self._slots.get(worker)
        if slot is None:
            if self._free_slots:
                slot = heapq.heappop(self._free_slots)
                self._workers[slot] = worker
            else:
                slot = len(self._workers)
                self._workers.append(worker)
                self._held.append([set() for _ in TierCode])
                self._bits += [1 << slot * NUM_TIERS + tier for tier in TierCode]
                self._ones |= 1 << slot * NUM_TIERS
            self._slots[worker] = slot
        return slot

    def _store(self, slot: int, tier: TierCode, hashes: Sequence[int]) -> None:
        held = self._held[slot][tier]
        num_held = len(held)
        held.update(hashes)
        if tier is TierCode.REMOTE:
            self._num_in_store += len(held) - num_held
        bit = self._bits[slot * NUM_TIERS + tier]
        shards = self._shards
        intern = self._fresh_intern().setdefault
        for block in hashes:
            shard = shards[block & _SHARD_MASK]
            mask = shard.setdefault(block, bit)
            if mask is not bit and not mask & bit:
                mask |= bit
                shard[block] = intern(mask, mask)

    def _remove(self, slot: int, tier: TierCode, hashes: Sequence[int]) -> None:
        held = self._held[slot][tier]
        num_held = len(held)
        held.difference_update(hashes)
        if tier is TierCode.REMOTE:
            self._num_in_store += len(held) - num_held
        bit = self._bits[slot * NUM_TIERS + tier]
        shards = self._shards
        intern = self._fresh_intern().setdefault
        for block in hashes:
            shard = shards[block & _SHARD_MASK]
            mask = shard.pop(block, bit)
            if mask != bit:
                mask &= ~bit
                shard[block] = intern(mask, mask)

    def _clear_slices(self, slot: int, tier: TierCode) -> Iterator[None]:
        held = self._held[slot][tier]
        while held:
            self._remove(slot, tier, list(islice(held, SLICE_BLOCKS)))
            yield
        # A set keeps its table when it is emptied.
        self._held[slot][tier] = set()

    def _fresh_intern(self) -> dict[int, int]:
        if len(self._intern) > _MAX_INTERNED:
            self._intern = {}
        return self._intern

    def _view(self, mask: int) -> tuple[int, int]:
        """Of each worker in `mask`, the bit of its fastest tier; and all its bits. Those of the
        remote tier do not count."""
        if len(self._views) > _MAX_VIEWS:
            self._views.clear()
        ones = self._ones
        near = mask & ones * 0b0111
        slower = near << 1 | (near & ones * 0b0011) << 2
        whole = ((near | near >> 1 | near >> 2) & ones) * 0b1111
        self._views[mask] = view = (near & ~slower, whole)
        return view


@lru_cache(maxsize=1024)
def _bit_numbers(mask: int) -> tuple[int, ...]:
    """The bits that are set, lowest first. Few masks are asked for often: see `_views`."""
    numbers = []
    while mask:
        bit = mask & -mask
        mask ^= bit
        numbers.append(bit.bit_length() - 1)
    return tuple(numbers)
