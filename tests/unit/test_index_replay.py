"""etcd's log, delivered in every way that a watch, a reconnect and a slow read can deliver it.

Two workers write: batches, folds, jumps, new epochs, farewells. One master reads: in order, a part
twice, single values late or never, snapshots of now and of before, and answers to its own reads
that took so long that they are old. Whatever came, once all has been delivered and every gap that
it names has been filled, the index is what the workers hold.
"""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.index_news import KEYS, A, B, Etcd, Master
from xllm.cache import event_codec as codec
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Head, Section, TierCode
from xllm.coordination import Change, Snapshot
from xllm.protocol import Epoch, WorkerId
from xllm.roles.index_view import WorkerSnapshot

TIERS = (TierCode.DEVICE, TierCode.DISK)
BLOCKS = range(12)

workers = st.sampled_from([A, B])
tiers = st.sampled_from(TIERS)
blocks = st.sets(st.sampled_from(BLOCKS), min_size=1, max_size=4)

Held = dict[TierCode, set[int]]


class Writer:
    """One worker as `cache_upload` would write for it, and what it really holds."""

    def __init__(self, etcd: Etcd, worker: WorkerId) -> None:
        self._etcd = etcd
        self._worker = worker
        self.epoch = 0
        self.is_registered = False
        self.held: Held = {tier: set() for tier in TIERS}
        self._seq = self._gen = 0

    def register(self) -> None:
        """A new lease; the tiers are as they were, and published anew by a jump."""
        self.epoch += 10
        self.is_registered = True
        self._seq = self._gen = 0
        self._etcd.register(self._worker, self.epoch)

    def leave(self) -> None:
        self.is_registered = False
        self._etcd.delete(KEYS.worker(self._worker))

    def write(self, kind: BlockEventKind, tier: TierCode, names: Iterable[int]) -> None:
        chosen = tuple(sorted(names))
        match kind:
            case BlockEventKind.STORED:
                self.held[tier] |= set(chosen)
            case BlockEventKind.REMOVED:
                self.held[tier] -= set(chosen)
            case BlockEventKind.CLEARED:
                self.held[tier], chosen = set(), ()
        self._seq += 1
        batch = EventBatch((Section(tier, kind, chosen),))
        self._etcd.delta(self._worker, self.epoch, self._seq, codec.encode_delta(batch))

    def snapshot(self, *, is_jump: bool, num_tidied: int) -> None:
        """All that is held, as a generation; `num_tidied` of the keys that it replaces are deleted.

        A jump includes a change that no delta has told.
        """
        if is_jump:
            self._seq += 1
            self.held[TierCode.DISK] ^= {11}
        self._gen += 1
        chunks = [
            EventBatch((Section(tier, BlockEventKind.STORED, tuple(sorted(names))),))
            for tier, names in self.held.items()
            if names
        ]
        for i, batch in enumerate(chunks):
            value = codec.encode_chunk(batch)
            self._etcd.chunk(self._worker, self.epoch, self._gen, i, value)
        self._etcd.head(self._worker, self.epoch, Head(self._gen, len(chunks), self._seq))
        prefix = KEYS.cache_of(self._worker, Epoch(self.epoch))
        for key in [k for k in sorted(self._etcd.kvs) if k.startswith(prefix)][:num_tidied]:
            name = key.removeprefix(prefix).split("/")
            is_old_delta = name[0] == "d" and int(name[1], 16) <= self._seq
            if is_old_delta or (name[0] == "s" and int(name[1], 16) < self._gen):
                self._etcd.delete(key)


class IndexReplay(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.etcd = Etcd()
        self.master = Master()
        self.writers = {worker: Writer(self.etcd, worker) for worker in (A, B)}
        self.num_delivered = 0
        """Of the log."""
        self.snapshots: list[tuple[int, Snapshot]] = []
        """What etcd was once, and how much of the log it includes."""
        self.reads: list[WorkerSnapshot] = []
        """Answers on their way."""

    @initialize()
    def begin(self) -> None:
        for writer in self.writers.values():
            writer.register()

    # Workers

    @rule(worker=workers, kind=st.sampled_from(BlockEventKind), tier=tiers, names=blocks)
    def write(
        self, worker: WorkerId, kind: BlockEventKind, tier: TierCode, names: set[int]
    ) -> None:
        if self.writers[worker].is_registered:
            self.writers[worker].write(kind, tier, names)

    @rule(worker=workers, is_jump=st.booleans(), num_tidied=st.integers(0, 9))
    def publish_snapshot(self, worker: WorkerId, is_jump: bool, num_tidied: int) -> None:
        if self.writers[worker].is_registered:
            self.writers[worker].snapshot(is_jump=is_jump, num_tidied=num_tidied)

    @rule(worker=workers)
    def register_anew(self, worker: WorkerId) -> None:
        self.writers[worker].register()
        self.writers[worker].snapshot(is_jump=True, num_tidied=0)

    @rule(worker=workers)
    def leave(self, worker: WorkerId) -> None:
        if self.writers[worker].is_registered:
            self.writers[worker].leave()

    # What the master hears

    @rule(count=st.integers(1, 6))
    def deliver(self, count: int) -> None:
        self.master.feed(*self.etcd.log[self.num_delivered : self.num_delivered + count])
        self.num_delivered = min(self.num_delivered + count, len(self.etcd.log))

    @precondition(lambda self: self.num_delivered)
    @rule(data=st.data())
    def deliver_the_last_ones_again(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, self.num_delivered - 1))
        self.master.feed(*self.etcd.log[first : self.num_delivered])

    @precondition(lambda self: self.num_delivered)
    @rule(data=st.data())
    def deliver_one_late(self, data: st.DataObject) -> None:
        change = data.draw(st.sampled_from(self.etcd.log[: self.num_delivered]))
        if not _is_registration(change):
            self.master.feed(change)

    @rule()
    def lose_one(self) -> None:
        """Nothing in etcd loses a change; whatever does, the next one tells."""
        following = self.etcd.log[self.num_delivered : self.num_delivered + 1]
        if following and not _is_registration(following[0]):
            self.num_delivered += 1

    @rule()
    def remember(self) -> None:
        self.snapshots.append((len(self.etcd.log), self.etcd.snapshot()))

    @rule(data=st.data())
    def begin_again_from_a_snapshot(self, data: st.DataObject) -> None:
        """The watch was cut off and etcd has compacted; or it came back older."""
        now = (len(self.etcd.log), self.etcd.snapshot())
        included, snapshot = data.draw(st.sampled_from([*self.snapshots, now]))
        self.master.feed(snapshot)
        self.num_delivered = included

    @rule()
    def ask_for_what_is_missing(self) -> None:
        asked = {read.worker_id for read in self.reads}
        for worker, epoch in self.master.view.missing():
            if worker in asked:
                continue  # as `IndexReader`, which reads again when it has fed what it has read
            self.reads.append(self.etcd.worker_snapshot(worker, epoch))

    @rule()
    def answer(self) -> None:
        if self.reads:
            self.master.feed(self.reads.pop(0))

    @invariant()
    def is_consistent(self) -> None:
        self.master.index.check_invariants()

    @rule()
    def settle(self) -> None:
        """Everybody writes once more, because a gap shows only at the next change; then nothing."""
        for writer in self.writers.values():
            if writer.is_registered:
                writer.write(BlockEventKind.STORED, TierCode.DEVICE, {0})
        self.deliver(len(self.etcd.log))
        while self.reads:
            self.answer()
        for _ in range(2):
            self.ask_for_what_is_missing()
            while self.reads:
                self.answer()
        assert self.master.view.missing() == []
        for worker, writer in self.writers.items():
            for tier in TIERS:
                expected = writer.held[tier] if writer.is_registered else set()
                assert self.master.held(worker, BLOCKS, tier) == expected, (worker, tier)

    def teardown(self) -> None:
        self.settle()


def _is_registration(change: Change) -> bool:
    return change.kv.key.startswith(KEYS.workers)


TestIndexReplay = IndexReplay.TestCase
TestIndexReplay.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
