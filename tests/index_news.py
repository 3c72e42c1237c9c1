"""What workers write under `cache/`: an etcd that is only a log, and a master that follows it."""

from __future__ import annotations

from collections.abc import Iterable

from xllm.cache import event_codec as codec
from xllm.cache.event_codec import Head, TierCode
from xllm.cache.index import CacheIndex
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue, Snapshot
from xllm.protocol import Epoch, WorkerId
from xllm.roles.index_view import IndexView, WorkerSnapshot

KEYS = Keys("t")
A, B = WorkerId("a:1"), WorkerId("b:1")


class Etcd:
    """What is there now, and all changes since the beginning."""

    def __init__(self) -> None:
        self.kvs: dict[str, KeyValue] = {}
        self.log: list[Change] = []
        self.revision = 1

    def put(self, key: str, value: bytes, lease: int) -> Change:
        self.revision += 1
        kv = KeyValue(key, value, self.revision, self.revision, lease)
        self.kvs[key] = kv
        self.log.append(Change(PUT, kv))
        return self.log[-1]

    def delete(self, key: str) -> Change:
        self.revision += 1
        del self.kvs[key]
        self.log.append(Change(DELETE, KeyValue(key, b"", 0, self.revision, 0)))
        return self.log[-1]

    def register(self, worker: WorkerId, epoch: int) -> Change:
        return self.put(KEYS.worker(worker), b"{}", epoch)

    def delta(self, worker: WorkerId, epoch: int, seq: int, value: bytes) -> Change:
        return self.put(f"{KEYS.cache_of(worker, Epoch(epoch))}d/{seq:016x}", value, epoch)

    def chunk(self, worker: WorkerId, epoch: int, gen: int, i: int, value: bytes) -> Change:
        return self.put(f"{KEYS.cache_of(worker, Epoch(epoch))}s/{gen:016x}/{i:016x}", value, epoch)

    def head(self, worker: WorkerId, epoch: int, head: Head) -> Change:
        key = f"{KEYS.cache_of(worker, Epoch(epoch))}head"
        return self.put(key, codec.encode_head(head), epoch)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.revision, tuple(self.kvs[key] for key in sorted(self.kvs)))

    def worker_snapshot(self, worker: WorkerId, epoch: Epoch) -> WorkerSnapshot:
        prefix = KEYS.cache_of(worker, epoch)
        kvs = [kv for key, kv in sorted(self.kvs.items()) if key.startswith(prefix)]
        return WorkerSnapshot(worker, epoch, kvs)


class Master:
    def __init__(self, *keeps: WorkerId) -> None:
        self.index = CacheIndex()
        self.view = IndexView(KEYS, self.index, lambda worker: worker in keeps)

    def feed(self, *updates: Snapshot | WorkerSnapshot | Change) -> None:
        for update in updates:
            self.view.feed([update] if isinstance(update, Change) else update)
        self.view.work()
        assert self.view.is_idle
        self.index.check_invariants()

    def held(
        self,
        worker: WorkerId,
        blocks: Iterable[int] = range(100),
        tier: TierCode = TierCode.DEVICE,
    ) -> set[int]:
        return {block for block in blocks if (worker, tier) in self.index.holders(block)}
