"""The shared store as a tier: what of it is known here, loads, and puts in the background.

    a prompt's blocks that are not here ──one `Ask`──> the book ──> match ──> `StoreRun` ──> device
    a committed block ──copy to a shared slot──> `Put` ──> the book

For the engine's thread; jobs are done elsewhere (`store_client.py`). Detached, the store knows no
block and takes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from xllm.cache.block_pool import BlockEvent
from xllm.cache.mover import Mover, Transfer, TransferGroup
from xllm.cache.rates import TransferRate
from xllm.cache.slab_format import Buffer
from xllm.cache.store_book import StoreBook
from xllm.cache.store_client import StoreClient
from xllm.cache.store_codes import StoreOutcome
from xllm.cache.store_jobs import Ask, BlockToPut, Get, Put, Remove
from xllm.protocol import BlockHash

ASK_TIMEOUT_S = 0.25
"""How long a prompt waits to hear what the store has of it."""

PRIOR_BYTES_PER_S = 500e6
"""Until something was loaded: see `peers.PRIOR_BYTES_PER_S`."""


@dataclass(slots=True)
class StoreTierCounters:
    """Since the start, in blocks unless it says otherwise."""

    num_asks: int = 0
    """Prompts for which the store was asked what it has."""
    ask_seconds: float = 0.0
    num_unanswered: int = 0
    """Of these asks, those that failed."""
    num_loaded: int = 0
    num_stored: int = 0
    put_seconds: float = 0.0
    num_full: int = 0
    """Not stored because the pool has no room."""
    num_absent: int = 0
    """Gone between asking and getting."""
    num_corrupt: int = 0
    num_failed: int = 0
    """Neither loaded nor stored, for any other reason."""


@dataclass(frozen=True, slots=True)
class StoreTierStatistics:
    is_attached: bool
    num_known: int
    """Blocks that are in the store as far as this worker knows."""
    num_detachments: int
    counters: StoreTierCounters
    load_bytes: int
    load_seconds: float
    bytes_per_s: float | None
    """Of loads; None: none was measured lately."""

    def block_s(self, block_bytes: int) -> float | None:
        """What loading a block is expected to take; None: detached."""
        if not self.is_attached:
            return None
        rate = self.bytes_per_s
        if not rate and self.load_bytes:
            rate = self.load_bytes / self.load_seconds
        return block_bytes / (rate or PRIOR_BYTES_PER_S)


class StoreQuestion:
    """A prompt waits for the answer while this is open."""

    __slots__ = ("_clock", "deadline", "is_answered")

    def __init__(self, deadline: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.deadline = deadline
        self.is_answered = False

    @property
    def is_open(self) -> bool:
        return not self.is_answered and self._clock() < self.deadline


class StoreTier:
    def __init__(self, client: StoreClient, mover: Mover, clock: Callable[[], float]) -> None:
        self.book = StoreBook()
        self.counters = StoreTierCounters()
        self.rate = TransferRate(clock)
        self._client = client
        self._mover = mover
        self._clock = clock
        self._is_attached = False
        self._generation = 0
        self._questions: dict[BlockHash, StoreQuestion] = {}
        """Not answered; by the first name that is asked for."""
        self._free_slots = list(client.slots.put_slots)
        self._num_puts = 0

    @property
    def prefix(self) -> str:
        """Of the keys of its blocks."""
        return self._client.prefix

    @property
    def is_attached(self) -> bool:
        return self._is_attached

    @property
    def is_idle(self) -> bool:
        """Nothing is on its way to the store."""
        return self._num_puts == 0

    @property
    def next_deadline(self) -> float | None:
        """When a question that is open now ends in any case."""
        now = self._clock()
        deadlines = (q.deadline for q in self._questions.values() if q.deadline > now)
        return min(deadlines, default=None)

    def poll(self) -> None:
        """Notices that the store has come or gone."""
        if self._generation != self._client.generation:
            self._generation = self._client.generation
            self._is_attached = self._client.is_attached
            # Whatever it held may be gone: a restarted master has forgotten everything.
            self.book.clear()

    def has(self, name: BlockHash) -> bool:
        """As far as is known here."""
        return self._is_attached and self.book.knows(name)

    def ask(self, names: Sequence[BlockHash]) -> StoreQuestion | None:
        """Finds out which of `names`, of one chain, are there; None: nobody to ask.

        The answer goes to the book.
        """
        now = self._clock()
        if not self._is_attached or any(q.deadline <= now for q in self._questions.values()):
            return None  # or somebody who has not answered in time before, and keeps us waiting
        question = self._questions.get(names[0])
        if question is None:
            question = StoreQuestion(now + ASK_TIMEOUT_S, self._clock)
            self._questions[names[0]] = question
            job = Ask(list(names))
            self._client.start(
                job,
                self._mover.open_elsewhere(
                    partial(self._end_ask, job, question, now), lambda: False
                ),
            )
        return question

    def open_run(self) -> StoreRun:
        return StoreRun(self, self._client, self._mover)

    # Puts

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def take_slot(self) -> tuple[int, Buffer]:
        """A slot for a block on its way to the store, until `put` or `give_slot`."""
        index = self._free_slots.pop()
        self._num_puts += 1
        return index, self._client.slot(index)

    def give_slot(self, index: int) -> None:
        self._free_slots.append(index)
        self._num_puts -= 1

    def put(self, blocks: Sequence[BlockToPut]) -> None:
        """Stores blocks that are in slots; gives the slots back when they are stored, or not."""
        job = Put(list(blocks))
        transfer = self._mover.open_elsewhere(
            partial(self._end_put, job, self._clock(), self._generation), lambda: False
        )
        self._client.start(job, transfer)

    # Everything else

    def clear(self) -> int:
        """Drops every block of the cache root from the store, for all workers; returns how many
        were known here."""
        if self._is_attached:
            self._client.start(Remove(None), None)
        return self.book.clear()

    def loaded(self, names: Sequence[BlockHash], outcomes: Sequence[StoreOutcome]) -> None:
        """What a run of loads brought."""
        by_outcome: dict[StoreOutcome, list[BlockHash]] = {}
        for name, outcome in zip(names, outcomes, strict=True):
            by_outcome.setdefault(outcome, []).append(name)
        self.book.touch(by_outcome.pop(StoreOutcome.DONE, []))
        absent = by_outcome.pop(StoreOutcome.ABSENT, [])
        corrupt = by_outcome.pop(StoreOutcome.CORRUPT, [])
        self.counters.num_absent += len(absent)
        self.counters.num_corrupt += len(corrupt)
        self.counters.num_failed += sum(map(len, by_outcome.values()))
        self.book.remove([*absent, *corrupt, *(n for names in by_outcome.values() for n in names)])
        if corrupt:
            self._client.start(Remove(corrupt), None)

    def take_events(self) -> list[BlockEvent]:
        return self.book.take_events()

    def statistics(self) -> StoreTierStatistics:
        return StoreTierStatistics(
            is_attached=self._is_attached,
            num_known=len(self.book),
            num_detachments=self._client.num_detachments,
            counters=replace(self.counters),
            load_bytes=self.rate.total_bytes,
            load_seconds=self.rate.total_seconds,
            bytes_per_s=self.rate.bytes_per_s,
        )

    def close(self, timeout_s: float) -> None:
        self._client.close(timeout_s)

    def check_invariants(self) -> None:
        self.book.check_invariants()
        slots = self._client.slots.put_slots
        assert len(self._free_slots) + self._num_puts == len(slots)
        assert set(self._free_slots) <= set(slots)

    def _end_ask(
        self, job: Ask, question: StoreQuestion, started_at: float, transfer: Transfer
    ) -> None:
        question.is_answered = True
        del self._questions[job.names[0]]
        self.counters.num_asks += 1
        self.counters.ask_seconds += self._clock() - started_at
        if transfer.error is not None:
            self.counters.num_unanswered += 1
        elif self._is_attached:
            there = [name for name, is_there in zip(job.names, job.found, strict=True) if is_there]
            gone = [n for n, is_there in zip(job.names, job.found, strict=True) if not is_there]
            self.book.add(there)
            self.book.remove(gone)

    def _end_put(self, job: Put, started_at: float, generation: int, transfer: Transfer) -> None:
        for block in job.blocks:
            self.give_slot(block.slot)
        outcomes = job.outcomes or [StoreOutcome.FAILED] * len(job.blocks)
        num_stored = outcomes.count(StoreOutcome.DONE)
        num_full = outcomes.count(StoreOutcome.FULL)
        self.counters.num_stored += num_stored
        self.counters.num_full += num_full
        self.counters.num_failed += len(outcomes) - num_stored - num_full
        self.counters.put_seconds += self._clock() - started_at
        if generation == self._generation:
            self.book.add(
                block.name
                for block, outcome in zip(job.blocks, outcomes, strict=True)
                if outcome is StoreOutcome.DONE
            )


class StoreRun:
    """From the shared store: nothing is pinned, and it may not have a block any more."""

    def __init__(self, tier: StoreTier, client: StoreClient, mover: Mover) -> None:
        self._tier = tier
        self._client = client
        self._mover = mover
        self._names: list[BlockHash] = []
        self._job: Get | None = None

    @property
    def max_blocks(self) -> int:
        return self._client.slots.num_get

    def try_add(self, block_hash: BlockHash) -> bool:
        self._names.append(block_hash)
        return True

    def start(
        self,
        block_ids: Sequence[int],
        deadline: float,
        on_end: Callable[[Transfer], None],
        group: TransferGroup,
    ) -> Transfer:
        job = self._job = Get(self._names, list(block_ids))
        transfer = self._mover.open_elsewhere(on_end, lambda: self._client.try_cancel(job), group)
        self._client.start(job, transfer)
        return transfer

    def end(self, transfer: Transfer) -> tuple[list[bool], int]:
        assert self._job is not None
        outcomes = self._job.outcomes or [StoreOutcome.FAILED] * len(self._names)
        self._tier.loaded(self._names, outcomes)
        sound = [outcome is StoreOutcome.DONE for outcome in outcomes]
        return sound, outcomes.count(StoreOutcome.CORRUPT)

    def abandon(self) -> None:
        """Nothing is held here."""
