"""What a worker writes to etcd next, and when. Pure: whoever writes it tells how it went.

    held        what is there, per tier, as the tiers' events say
    published   what the index was told: all writes so far add up to it
    dirty       where the two may differ

A delta is the difference, so what came and went between two batches cancels by itself. A batch is
due `BATCH_DELAY_S` after the first change, and leaves when the worker's share of the cluster's
budget has room: the longer it has to wait, the more cancels. Removals go first, since a block that
is not there costs more than one nobody knows of; then the chains that were used most.

    one write in flight ──written──> the next may leave
            │ ──failed──> the same write again, later
            └ ──fenced──> nothing until `begin_epoch`

Deltas pile up, so the plan folds them: the state at `base_seq` is written as the chunks of a new
generation, between the deltas that go on meanwhile; then one transaction puts `head` and deletes
what it replaces. A snapshot that says something new is a *jump*: the first of an epoch, even if it
is empty, and any for which the blocks that fit the masters' memory were chosen anew. It has a
number of the sequence of its own, so that readers can tell it from a fold of deltas that they have
seen, and deltas wait for it.

`docs/index-format.md` has the keys and the bytes.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xllm.cache import event_codec as codec
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import EventBatch, Head, Section, TierCode
from xllm.cache.upload_budget import Bucket, Share
from xllm.cache.upload_state import TierState

BATCH_DELAY_S = 0.05
MAX_DELTA_BYTES = 256 * 1024
MIN_DELTA_BLOCKS = 128
MIN_CHUNK_BYTES = 16 * 1024
MAX_CHUNK_BYTES = 256 * 1024
WRITE_OVERHEAD_BYTES = 128
"""What a write costs beside its values: keys, compares, etcd's own record."""

FOLD_MIN_BYTES = 64 * 1024
FOLD_FACTOR = 2
"""Folded when the deltas are this many times as large as what a snapshot would be."""
FOLD_MAX_DELTAS = 512
"""A reader that starts has this many keys per worker to read, at most."""

RETRY_S = (0.2, 5.0)
"""After a failure, doubling from the first to the second."""
OUTAGE_JITTER_S = 2.0
"""All workers find etcd again at the same moment."""
NO_SPACE_RETRY_S = 10.0


@dataclass(frozen=True, slots=True)
class Write:
    """One transaction; keys are relative to the epoch's folder."""

    puts: tuple[tuple[str, bytes], ...]
    deletes: tuple[tuple[str, str], ...] = ()
    """Ranges, without their ends."""

    @property
    def num_bytes(self) -> int:
        return WRITE_OVERHEAD_BYTES + sum(len(value) for _, value in self.puts)


class Failure(enum.Enum):
    UNAVAILABLE = "unavailable"
    NO_SPACE = "no_space"


@dataclass(frozen=True, slots=True)
class UploadStatistics:
    num_held: int
    num_published: int
    num_dirty: int
    num_writes: int
    num_bytes: int
    seq: int
    gen: int


class UploadPlan:
    """One worker's uploads. Synchronous, for one thread; `now` never goes back.

    `due_at` says when `take` is worth a call; after `take` gave a write, one of `written`,
    `failed` or `fenced` has to follow before the next.
    """

    def __init__(self, share: Share, rng: random.Random) -> None:
        self.share = share
        self._rng = rng
        self._bucket = Bucket(share)
        self._tiers = [TierState() for _ in TierCode]
        self._heat: dict[int, int] = {}
        self._changed_at: float | None = None
        """The first change that no batch has."""
        self._in_flight: Write | None = None
        self._sent = False
        self._not_before = 0.0
        self._num_failures = 0
        self._fenced = True
        self._seq = 0
        self._gen = 0
        self._fold: _Fold | None = None
        self._fold_next = False
        """Deltas and chunks take turns."""
        self._num_deltas = 0
        self._delta_bytes = 0
        self._num_writes = 0
        self._num_bytes = 0

    # What happens at the worker

    def record(self, tier: TierCode, events: Iterable[BlockEvent], now: float) -> None:
        """Events of one tier, in order."""
        state = self._tiers[tier]
        for event in events:
            if event.kind is BlockEventKind.CLEARED:
                state.clear()
                continue
            assert event.hash is not None
            block = codec.short_hash(event.hash)
            if event.kind is BlockEventKind.STORED:
                state.store(block)
            else:
                state.remove(block)
        if self._changed_at is None and (state.dirty or state.cleared):
            self._changed_at = now

    def touch(self, blocks: Iterable[int]) -> None:
        """These blocks, by short hash, served a prompt: what is used goes first."""
        heat = self._heat
        for block in blocks:
            heat[block] = heat.get(block, 0) + 1
        if len(heat) > 4096 + 2 * sum(len(state.held) for state in self._tiers):
            self._heat = {b: n >> 1 for b, n in heat.items() if n > 1}

    def set_share(self, share: Share, now: float) -> None:
        self.share = share
        self._bucket.set_share(share, now)

    def begin_epoch(self, now: float, *, after_outage: bool = False) -> None:
        """Nothing of this epoch is in etcd yet."""
        self._fenced = False
        self._in_flight = None
        self._sent = False
        self._num_failures = 0
        self._seq = self._gen = 0
        self._fold = None
        self._num_deltas = self._delta_bytes = 0
        self._not_before = now + (self._jitter(OUTAGE_JITTER_S) if after_outage else 0.0)
        self._start_fold(is_jump=True)

    # What etcd is told

    def due_at(self, now: float) -> float:
        """When `take` has something to give, if nothing else happens; infinity: not before that."""
        if self._fenced or self._sent:
            return math.inf
        if self._in_flight is not None:
            size = self._in_flight.num_bytes
            return max(self._not_before, self._bucket.ready_at(size, now))
        fold_at = delta_at = math.inf
        if self._fold is not None:
            ready_at = self._bucket.ready_at(self._fold.next_bytes, now)
            fold_at = max(self._not_before, ready_at)
        if self._changed_at is not None and not self._is_fold_next():
            ready_at = self._bucket.ready_at(WRITE_OVERHEAD_BYTES, now)
            delta_at = max(self._changed_at + BATCH_DELAY_S, self._not_before, ready_at)
        return min(fold_at, delta_at)

    def take(self, now: float) -> Write | None:
        """The write that is to be sent now, if any is due."""
        if self.due_at(now) > now:
            return None
        if self._in_flight is None:
            self._in_flight = self._next_write(now)
        if self._in_flight is not None:
            self._sent = True
            self._bucket.take(self._in_flight.num_bytes, now)
            self._num_writes += 1
            self._num_bytes += self._in_flight.num_bytes
        return self._in_flight

    def written(self, now: float) -> None:
        """The write in flight is in etcd."""
        if self._num_failures:
            self._num_failures = 0
            self._not_before = now + self._jitter(OUTAGE_JITTER_S)
        self._in_flight = None
        self._sent = False

    def failed(self, failure: Failure, now: float) -> None:
        """The write in flight may be in etcd or not: the same one goes again later."""
        self._sent = False
        delay_s = min(RETRY_S[0] * 2**self._num_failures, RETRY_S[1])
        if failure is Failure.NO_SPACE:
            delay_s = NO_SPACE_RETRY_S
        self._num_failures = min(self._num_failures + 1, 16)
        self._not_before = now + delay_s * self._rng.uniform(0.5, 1.0)

    def fenced(self) -> None:
        """The epoch is over."""
        self._fenced = True
        self._in_flight = None
        self._sent = False

    def statistics(self) -> UploadStatistics:
        return UploadStatistics(
            num_held=sum(len(state.held) for state in self._tiers),
            num_published=sum(len(state.published) for state in self._tiers),
            num_dirty=sum(len(state.dirty) for state in self._tiers),
            num_writes=self._num_writes,
            num_bytes=self._num_bytes,
            seq=self._seq,
            gen=self._gen,
        )

    def check_invariants(self) -> None:
        """Re-derives everything from scratch; tests call it after each operation."""
        for state in self._tiers:
            state.check_invariants()
        assert not self._sent or self._in_flight is not None
        dirty = any(state.dirty or state.cleared for state in self._tiers)
        assert self._fenced or not dirty or self._changed_at is not None

    # Building writes

    def _is_delta_due(self, now: float) -> bool:
        return self._changed_at is not None and now >= self._changed_at + BATCH_DELAY_S

    def _is_fold_next(self) -> bool:
        """Whether a delta has to wait for a part of the fold."""
        return self._fold is not None and (self._fold.is_jump or self._fold_next)

    def _next_write(self, now: float) -> Write | None:
        fold = self._fold
        if fold is not None and (self._is_fold_next() or not self._is_delta_due(now)):
            return self._next_of_fold(fold)
        self._fold_next = True
        batch = self._take_delta(now)
        if not batch.sections:
            return None
        self._seq += 1
        key, value = f"d/{self._seq:016x}", codec.encode_delta(batch)
        self._num_deltas += 1
        self._delta_bytes += len(value)
        num_published = sum(len(state.published) for state in self._tiers)
        snapshot_bytes = max(FOLD_MIN_BYTES, num_published * codec.HASH_BYTES)
        many = self._num_deltas >= FOLD_MAX_DELTAS
        if fold is None and (many or self._delta_bytes >= FOLD_FACTOR * snapshot_bytes):
            self._start_fold(is_jump=any(state.silent for state in self._tiers))
        return Write(((key, value),))

    def _take_delta(self, now: float) -> EventBatch:
        """Takes at most what the bucket has room for out of what is dirty."""
        room = min(MAX_DELTA_BYTES, self._bucket.room_bytes(now)) // codec.HASH_BYTES
        room = max(room, MIN_DELTA_BLOCKS)
        sections = []
        for tier, state in zip(TierCode, self._tiers, strict=True):
            if state.cleared:
                sections.append(Section(tier, BlockEventKind.CLEARED))
                state.cleared = False
            if removed := state.take_removed(room):
                sections.append(Section(tier, BlockEventKind.REMOVED, removed))
                room -= len(removed)
        num_published = sum(len(state.published) for state in self._tiers)
        for tier, state in zip(TierCode, self._tiers, strict=True):
            allowed = self.share.max_blocks - num_published
            if stored := state.take_stored(room, allowed, self._heat):
                sections.append(Section(tier, BlockEventKind.STORED, stored))
                room -= len(stored)
                num_published += len(stored)
        left = any(state.dirty for state in self._tiers)
        self._changed_at = now if left else None
        return EventBatch(tuple(sections))

    def _start_fold(self, *, is_jump: bool) -> None:
        """Copies the present state, or what should be the present state from now on."""
        if is_jump:
            self._seq += 1
            allowed = self.share.max_blocks
            for state in self._tiers:
                allowed -= state.choose_anew(allowed, self._heat)
            self._changed_at = None
        self._gen += 1
        size = int(min(max(self.share.bytes_per_s, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES))
        chunks = [
            codec.encode_chunk(batch)
            for tier, state in zip(TierCode, self._tiers, strict=True)
            for batch in codec.split_stored(tier, tuple(state.published), size)
        ]
        self._fold = _Fold(Head(self._gen, len(chunks), self._seq), chunks, is_jump)
        self._num_deltas = self._delta_bytes = 0

    def _next_of_fold(self, fold: _Fold) -> Write:
        """The next chunk, or what makes the whole generation valid."""
        self._fold_next = False
        head = fold.head
        if fold.num_taken < head.chunks:
            key = f"s/{head.gen:016x}/{fold.num_taken:016x}"
            value = fold.chunks[fold.num_taken]
            fold.num_taken += 1
            return Write(((key, value),))
        self._fold = None
        older = ("s/", f"s/{head.gen:016x}/")
        included = ("d/", f"d/{head.base_seq + 1:016x}")
        return Write((("head", codec.encode_head(head)),), (older, included))

    def _jitter(self, most_s: float) -> float:
        return self._rng.uniform(0.0, most_s)


class _Fold:
    """A generation that is being written."""

    __slots__ = ("chunks", "head", "is_jump", "num_taken")

    def __init__(self, head: Head, chunks: Sequence[bytes], is_jump: bool) -> None:
        self.head = head
        self.chunks = chunks
        self.is_jump = is_jump
        """It is not what the deltas add up to: they wait for it."""
        self.num_taken = 0

    @property
    def next_bytes(self) -> int:
        left = self.num_taken < len(self.chunks)
        return WRITE_OVERHEAD_BYTES + (len(self.chunks[self.num_taken]) if left else 0)
