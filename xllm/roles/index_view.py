"""What etcd says of the workers' caches, turned into a `CacheIndex`. Pure.

Fed with what `watch_prefix` yields for the namespace, or for `workers/` and `cache/` in one order:

    workers/{id} PUT, another lease    its epoch: all of the one before is forgotten
    workers/{id} DELETE                the epoch is over; its blocks stay until the next one, if
                                       `keep` says that the worker still answers
    d/{seq}, next in order             applied; seen already: nothing; later: a gap, resync
    s/{gen}/{i}                        kept until the head of that generation
    head                               a fold of what is known: nothing; a jump: replaces it
    DELETE under cache/                nothing: a writer's tidying, or the end of a lease

Whatever belongs to an epoch that is not the worker's present one changes nothing, however late it
comes. After a Snapshot, a worker whose epoch and sequence go on without a gap keeps what is known.

`feed` only queues. `work` decodes and applies for as long as it is given, so that the loop that
serves requests is not held up: a slice of the index's work is shorter than a millisecond.

Not here: who reads etcd (`index_reader.py`), who may be asked for a prompt (`registry.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from xllm.cache import event_codec as codec
from xllm.cache.event_codec import BadValue, EventBatch, Head, TierCode
from xllm.cache.index import CacheIndex
from xllm.coordination import PUT, Change, Keys, KeyValue, Snapshot
from xllm.protocol import Epoch, WorkerId

logger = logging.getLogger(__name__)

SLICE_KEYS = 256
"""Of a snapshot, sorted between two yields: about 0.5 ms."""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """All keys of one epoch, read again because of a gap."""

    worker_id: WorkerId
    epoch: Epoch
    kvs: Sequence[KeyValue]


@dataclass(frozen=True, slots=True)
class IndexViewStatistics:
    num_workers: int
    num_batches: int
    num_gaps: int
    num_late: int
    """Batches of an epoch that was not the worker's present one."""
    num_bad: int
    num_bytes: int
    """Of the values that were read."""
    num_queued: int


class _Epoch:
    """How far one worker's present epoch is known."""

    __slots__ = ("chunks", "gen", "id", "is_over", "lost", "seen", "seq")

    def __init__(self, epoch_id: int) -> None:
        self.id = epoch_id
        self.seq = 0
        """The last number that the index includes; 0: nothing was published yet."""
        self.seen = 0
        """The last number that was heard of since the last read, applied or not."""
        self.gen = 0
        self.chunks: dict[tuple[int, int], bytes] = {}
        """Of generations that have no head yet."""
        self.lost = False
        """Something is missing: nothing is applied until a resync."""
        self.is_over = False


class IndexView:
    """Keeps one `CacheIndex` true. Synchronous, for one thread.

    `keep` tells whether a worker still answers though its key is gone.
    """

    def __init__(
        self, keys: Keys, index: CacheIndex, keep: Callable[[WorkerId], bool] = lambda _: False
    ) -> None:
        self._keys = keys
        self._index = index
        self._keep = keep
        self._epochs: dict[WorkerId, _Epoch] = {}
        self._queue: deque[Snapshot | list[Change] | WorkerSnapshot | WorkerId] = deque()
        self._running: Iterator[None] | None = None
        self._num_batches = self._num_gaps = self._num_late = self._num_bad = 0
        self._num_bytes = 0

    def feed(self, update: Snapshot | list[Change] | WorkerSnapshot) -> None:
        """News, in the order in which they were read."""
        self._queue.append(update)

    def forget(self, worker_id: WorkerId) -> None:
        """The worker does not answer any more: `keep` is asked again."""
        self._queue.append(worker_id)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Everything that was fed is in the index."""
        return self._running is None and not self._queue

    def work(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Applies what was fed until nothing is left or `is_over`, asked after each slice."""
        while True:
            if self._running is None:
                if not self._queue:
                    return
                self._running = self._apply(self._queue.popleft())
            for _ in self._running:
                if is_over():
                    return
            self._running = None

    def missing(self) -> list[tuple[WorkerId, Epoch]]:
        """Epochs of which something is missing: to be read again and fed as `WorkerSnapshot`."""
        return [(w, Epoch(e.id)) for w, e in self._epochs.items() if e.lost and not e.is_over]

    def workers_without_events(self) -> list[WorkerId]:
        """Registered, but nothing was published: they are routed to by load only."""
        return sorted(w for w, e in self._epochs.items() if not e.seq and not e.is_over)

    def statistics(self) -> IndexViewStatistics:
        return IndexViewStatistics(
            num_workers=len(self._epochs),
            num_batches=self._num_batches,
            num_gaps=self._num_gaps,
            num_late=self._num_late,
            num_bad=self._num_bad,
            num_bytes=self._num_bytes,
            num_queued=len(self._queue),
        )

    def _apply(self, update: Snapshot | list[Change] | WorkerSnapshot | WorkerId) -> Iterator[None]:
        match update:
            case Snapshot():
                yield from self._apply_snapshot(update)
            case WorkerSnapshot():
                epoch = self._epochs.get(update.worker_id)
                if epoch is not None and epoch.id == update.epoch:
                    yield from self._load(update.worker_id, epoch, update.kvs)
                    if epoch.seq < epoch.seen and not epoch.lost:
                        # It was read before that was written; the next one is read after.
                        self._lose(update.worker_id, epoch, f"read {epoch.seq} of {epoch.seen}")
                    epoch.seen = epoch.seq
            case str():
                epoch = self._epochs.get(update)
                if epoch is not None and epoch.is_over:
                    yield from self._end(update, epoch)
            case _:
                for change in update:
                    yield from self._apply_change(change)

    def _apply_change(self, change: Change) -> Iterator[None]:
        key = change.kv.key
        if key.startswith(self._keys.workers):
            worker_id = WorkerId(key.removeprefix(self._keys.workers))
            if change.kind is PUT:
                if change.kv.value:  # else somebody wrote it who is none of us
                    yield from self._begin(worker_id, change.kv.lease)
            elif (ended := self._epochs.get(worker_id)) is not None:
                yield from self._end(worker_id, ended)
        elif change.kind is PUT and key.startswith(self._keys.cache):
            try:
                yield from self._apply_value(key, change.kv.value)
            except (BadValue, ValueError) as error:
                self._num_bad += 1
                logger.warning("bad_index_value key=%s error=%r", key, str(error))

    def _begin(self, worker_id: WorkerId, lease: int) -> Iterator[None]:
        epoch = self._epochs.get(worker_id)
        if epoch is not None and epoch.id == lease:
            epoch.is_over = False
            return
        self._epochs[worker_id] = _Epoch(lease)
        yield from self._index.remove_worker_slices(worker_id)

    def _end(self, worker_id: WorkerId, epoch: _Epoch) -> Iterator[None]:
        epoch.is_over = True
        if not self._keep(worker_id):
            del self._epochs[worker_id]
            yield from self._index.remove_worker_slices(worker_id)

    def _apply_value(self, key: str, value: bytes) -> Iterator[None]:
        """Raises: BadValue, ValueError for a key or value that is none of ours."""
        self._num_bytes += len(value)
        worker_id, lease, name = self._parse(key)
        epoch = self._epochs.get(worker_id)
        if epoch is None or epoch.id != lease or epoch.is_over:
            self._num_late += 1
            return
        match name:
            case ["d", seq_text]:
                seq = int(seq_text, 16)
                epoch.seen = max(epoch.seen, seq)
                if epoch.lost:
                    return
                if seq == epoch.seq + 1:
                    yield from self._apply_batch(worker_id, epoch, codec.decode_delta(value), seq)
                elif seq > epoch.seq:
                    self._lose(worker_id, epoch, f"delta {seq} after {epoch.seq}")
            case ["s", gen_text, number_text]:
                gen = int(gen_text, 16)
                if gen > epoch.gen and not epoch.lost:
                    epoch.chunks[gen, int(number_text, 16)] = value
            case ["head"]:
                head = codec.decode_head(value)
                epoch.seen = max(epoch.seen, head.base_seq)
                if not epoch.lost:
                    yield from self._apply_head(worker_id, epoch, head)
            case _:
                raise ValueError("unknown key")

    def _apply_batch(
        self, worker_id: WorkerId, epoch: _Epoch, batch: EventBatch, seq: int
    ) -> Iterator[None]:
        # The slices may outlast this batch's turn, but not another of the same worker's.
        epoch.seq = seq
        self._num_batches += 1
        yield from self._index.apply_slices(worker_id, batch)

    def _apply_head(self, worker_id: WorkerId, epoch: _Epoch, head: Head) -> Iterator[None]:
        if head.gen <= epoch.gen:
            return
        chunks = [
            epoch.chunks.get((head.gen, i)) for i in range(min(head.chunks, len(epoch.chunks)))
        ]
        epoch.chunks = {key: value for key, value in epoch.chunks.items() if key[0] > head.gen}
        epoch.gen = head.gen
        if head.base_seq <= epoch.seq:
            return
        if len(chunks) < head.chunks or None in chunks:
            self._lose(worker_id, epoch, f"generation {head.gen} without all its chunks")
            return
        yield from self._replace(worker_id, epoch, head, [chunk for chunk in chunks if chunk])

    def _replace(
        self, worker_id: WorkerId, epoch: _Epoch, head: Head | None, chunks: Iterable[bytes]
    ) -> Iterator[None]:
        for tier in TierCode:
            yield from self._index.clear_slices(worker_id, tier)
        try:
            for chunk in chunks:
                yield from self._index.apply_slices(worker_id, codec.decode_chunk(chunk))
        except BadValue as error:
            self._lose(worker_id, epoch, str(error))  # changes go with all of it or nothing
            raise
        epoch.gen, epoch.seq = (head.gen, head.base_seq) if head is not None else (0, 0)

    def _lose(self, worker_id: WorkerId, epoch: _Epoch, reason: str) -> None:
        epoch.lost = True
        epoch.chunks.clear()
        self._num_gaps += 1
        logger.warning("index_gap worker_id=%s reason=%r", worker_id, reason)

    def _apply_snapshot(self, snapshot: Snapshot) -> Iterator[None]:
        leases: dict[WorkerId, int] = {}
        by_epoch: dict[tuple[WorkerId, int], list[KeyValue]] = {}
        for number, kv in enumerate(snapshot.kvs):
            if number % SLICE_KEYS == SLICE_KEYS - 1:
                yield
            if kv.key.startswith(self._keys.workers):
                if not kv.value:
                    continue
                leases[WorkerId(kv.key.removeprefix(self._keys.workers))] = kv.lease
            elif kv.key.startswith(self._keys.cache):
                try:
                    worker_id, lease, _ = self._parse(kv.key)
                except ValueError:
                    continue
                by_epoch.setdefault((worker_id, lease), []).append(kv)
        for worker_id, epoch in list(self._epochs.items()):
            if worker_id not in leases:
                yield from self._end(worker_id, epoch)
        for worker_id, lease in leases.items():
            yield from self._begin(worker_id, lease)
            kvs = by_epoch.get((worker_id, lease), ())
            epoch = self._epochs[worker_id]
            yield from self._load(worker_id, epoch, kvs)
            epoch.seen = epoch.seq

    def _load(self, worker_id: WorkerId, epoch: _Epoch, kvs: Sequence[KeyValue]) -> Iterator[None]:
        """Brings one worker to what these keys, all of its epoch, say."""
        try:
            yield from self._load_checked(worker_id, epoch, kvs)
        except (BadValue, ValueError) as error:
            self._num_bad += 1
            logger.warning("bad_index_value worker_id=%s error=%r", worker_id, str(error))

    def _load_checked(
        self, worker_id: WorkerId, epoch: _Epoch, kvs: Sequence[KeyValue]
    ) -> Iterator[None]:
        head: Head | None = None
        chunks: dict[tuple[int, int], bytes] = {}
        deltas: dict[int, bytes] = {}
        for kv in kvs:
            self._num_bytes += len(kv.value)
            match self._parse(kv.key)[2]:
                case ["head"]:
                    head = codec.decode_head(kv.value)
                case ["s", gen_text, number_text]:
                    chunks[int(gen_text, 16), int(number_text, 16)] = kv.value
                case ["d", seq_text]:
                    deltas[int(seq_text, 16)] = kv.value
        base = head.base_seq if head is not None else 0
        gen = head.gen if head is not None else 0
        goes_on = not epoch.lost and base <= epoch.seq <= max(deltas, default=base)
        if not goes_on:
            num_chunks = head.chunks if head is not None else 0
            # A number is believed no further than there are values.
            numbers = range(min(num_chunks, len(chunks)))
            wanted = [chunks[gen, i] for i in numbers if (gen, i) in chunks]
            if len(wanted) < num_chunks:
                raise BadValue(f"generation {gen} has {len(wanted)} of {num_chunks} chunks")
            yield from self._replace(worker_id, epoch, head, wanted)
        epoch.lost = False
        epoch.gen = gen
        epoch.chunks = {key: value for key, value in chunks.items() if key[0] > gen}
        for seq in sorted(seq for seq in deltas if seq > epoch.seq):
            if seq != epoch.seq + 1:
                logger.error("index_writer_gap worker_id=%s seq=%d", worker_id, seq)
            yield from self._apply_batch(worker_id, epoch, codec.decode_delta(deltas[seq]), seq)

    def _parse(self, key: str) -> tuple[WorkerId, int, list[str]]:
        """Raises: ValueError."""
        worker_id, epoch, *name = key.removeprefix(self._keys.cache).split("/")
        return WorkerId(worker_id), int(epoch, 16), name
