"""Workers that publish and masters that read, over a real etcd."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from etcd_server import EtcdServer, Wire, until

from xllm.cache import upload_plan
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import TierCode, short_hash
from xllm.cache.index import CacheIndex
from xllm.cache.upload import IndexUploader
from xllm.cache.upload_budget import Share
from xllm.cache.upload_plan import UploadPlan
from xllm.coordination import EtcdClient, EtcdNoSpace, Keys, Session
from xllm.protocol import BlockHash, WorkerId
from xllm.roles.index_reader import IndexReader
from xllm.roles.index_view import IndexView

KEYS = Keys("test")
A, B = WorkerId("127.0.0.1:1"), WorkerId("127.0.0.1:2")
DEVICE, HOST, *_ = TierCode


def name(number: int) -> BlockHash:
    return BlockHash(sha256(str(number).encode()).digest()[:16])


class Worker:
    """The etcd side of one: a session, and what it publishes."""

    def __init__(self, client: EtcdClient, worker_id: WorkerId, ttl_s: float = 2) -> None:
        self.worker_id = worker_id
        self.session = Session(client, ttl_s)
        plan = UploadPlan(Share(puts_per_s=500, bytes_per_s=5e6), random.Random(1))
        self.uploader = IndexUploader(self.session, KEYS, worker_id, plan)
        self.held: dict[TierCode, set[int]] = {tier: set() for tier in TierCode}

    def store(self, tier: TierCode, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        self.held[tier].update(numbers)
        self.uploader.record(tier, [BlockEvent(BlockEventKind.STORED, name(n)) for n in numbers])

    def remove(self, tier: TierCode, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        self.held[tier].difference_update(numbers)
        self.uploader.record(tier, [BlockEvent(BlockEventKind.REMOVED, name(n)) for n in numbers])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Worker]:
        async with _running(self.session.run):
            await self.session.register(KEYS.worker(self.worker_id), b"{}", exclusive=True)
            async with _running(self.uploader.run):
                yield self


class Master:
    """The etcd side of one: the index, and what keeps it up."""

    def __init__(self, client: EtcdClient) -> None:
        self.index = CacheIndex()
        self.view = IndexView(KEYS, self.index)
        self.reader = IndexReader(client, KEYS, self.view)

    def knows(self, *workers: Worker) -> bool:
        """Exactly what these hold."""
        for worker in workers:
            for tier, numbers in worker.held.items():
                if self.index.num_held(worker.worker_id)[tier] != len(numbers):
                    return False
                for number in numbers:
                    if (worker.worker_id, tier) not in self.index.holders(short_hash(name(number))):
                        return False
        return self.index.statistics().num_workers <= len(workers)


@asynccontextmanager
async def _running(*runs: Callable[[], object]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(run()) for run in runs]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results


async def test_what_workers_hold_is_what_masters_know(client: EtcdClient) -> None:
    early, late = Master(client), Master(client)
    async with (
        _running(early.reader.run),
        Worker(client, A).running() as a,
        Worker(client, B).running() as b,
    ):
        for round_number in range(5):
            a.store(DEVICE, range(round_number * 100, round_number * 100 + 100))
            b.store(HOST, range(round_number * 50, round_number * 50 + 60))
            a.remove(DEVICE, range(round_number * 100, round_number * 100 + 30))
            await asyncio.sleep(0.06)
        await until(lambda: early.knows(a, b))
        async with _running(late.reader.run):
            await until(lambda: late.knows(a, b))
        early.index.check_invariants()
        assert early.view.workers_without_events() == []
    prompt = [short_hash(name(n)) for n in range(30, 100)]
    assert early.index.match(prompt)[A][DEVICE] == 70


async def test_deltas_are_folded_and_compacted_and_a_late_master_still_reads_all(
    client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_plan, "FOLD_MAX_DELTAS", 5)
    early, late = Master(client), Master(client)
    async with _running(early.reader.run), Worker(client, A).running() as a:
        for i in range(18):
            a.store(DEVICE, range(i * 10, i * 10 + 10))
            await until(lambda: early.knows(a))
        folder = KEYS.cache_of(A, a.session.epoch)
        await until(lambda: a.uploader.statistics().gen >= 3)
        status = await client.status()
        await client.compact(status.revision)
        keys = [kv.key.removeprefix(folder) for kv in (await client.range(folder)).kvs]
        assert sum(key.startswith("d/") for key in keys) <= 10
        async with _running(late.reader.run):
            await until(lambda: late.knows(a))


async def test_a_worker_that_dies_takes_its_part_of_the_index_with_it(client: EtcdClient) -> None:
    master = Master(client)
    async with _running(master.reader.run):
        async with Worker(client, A).running() as a:
            a.store(DEVICE, range(10))
            await until(lambda: master.knows(a))
        await a.session.close()
        await until(lambda: master.index.statistics().num_blocks == 0)


async def test_an_etcd_that_comes_back_empty_learns_everything_again(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    master = Master(client)
    async with (
        _running(master.reader.run),
        Worker(client, A).running() as a,
        Worker(client, B).running() as b,
    ):
        a.store(DEVICE, range(100))
        b.store(DEVICE, range(50, 150))
        await until(lambda: master.knows(a, b))
        before = a.session.epoch
        etcd.wipe()
        a.store(HOST, range(5))
        etcd.start()
        await until(lambda: a.session.epoch != before and master.knows(a, b), within_s=20.0)


async def test_a_fenced_worker_cannot_write(client: EtcdClient) -> None:
    master = Master(client)
    async with _running(master.reader.run), Worker(client, A).running() as old:
        old.store(DEVICE, range(10))
        await until(lambda: master.knows(old))
        # Its key is taken over by another process, as after a long pause.
        folder = KEYS.cache_of(A, old.session.epoch)
        before = {kv.key for kv in (await client.range(folder)).kvs}
        await client.put(KEYS.worker(A), b"{}")
        await until(lambda: master.index.statistics().num_blocks == 0)
        old.store(DEVICE, range(10, 20))
        await asyncio.sleep(0.3)
        assert {kv.key for kv in (await client.range(folder)).kvs} == before
        assert master.index.statistics().num_blocks == 0


async def test_a_lost_connection_delays_and_repeats_but_changes_nothing(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire:
        shaky = EtcdClient([wire.address], timeout_s=1.0)
        await shaky.connect(5.0)
        master = Master(shaky)
        try:
            async with _running(master.reader.run), Worker(shaky, A, ttl_s=30).running() as a:
                for i in range(12):
                    a.store(DEVICE, range(i * 10, i * 10 + 10))
                    if i % 2:
                        a.remove(DEVICE, range(i * 10, i * 10 + 5))
                    if i % 4 == 1:
                        wire.cut()
                    if i % 4 == 3:
                        wire.mend()
                    await asyncio.sleep(0.06)
                wire.mend()
                await until(lambda: master.knows(a), within_s=20.0)
        finally:
            await shaky.close()


async def test_a_full_etcd_stops_uploads_with_one_warning_and_they_resume(
    client: EtcdClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upload_plan, "NO_SPACE_RETRY_S", 0.1)
    monkeypatch.setattr(upload_plan, "OUTAGE_JITTER_S", 0.1)
    master = Master(client)
    async with _running(master.reader.run), Worker(client, A).running() as a:
        a.store(DEVICE, range(10))
        await until(lambda: master.knows(a))
        real = a.session.fenced_txn

        async def full(*_: object, **__: object) -> bool:
            raise EtcdNoSpace("database space exceeded")

        monkeypatch.setattr(a.session, "fenced_txn", full)
        a.store(DEVICE, range(10, 20))
        await asyncio.sleep(0.5)
        assert caplog.text.count("index_upload_stopped") == 1
        monkeypatch.setattr(a.session, "fenced_txn", real)
        await until(lambda: master.knows(a))


async def test_an_etcd_whose_quota_is_full_stops_uploads_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upload_plan, "NO_SPACE_RETRY_S", 0.1)
    monkeypatch.setattr(upload_plan, "OUTAGE_JITTER_S", 0.1)
    etcd = EtcdServer(tmp_path / "etcd", "--quota-backend-bytes=4194304")
    etcd.start()
    client = EtcdClient([etcd.address])
    try:
        await client.connect(5.0)
        master = Master(client)
        async with _running(master.reader.run), Worker(client, A).running() as a:
            a.store(DEVICE, range(10))
            await until(lambda: master.knows(a))
            with pytest.raises(EtcdNoSpace):
                await _fill(client)
            a.store(DEVICE, range(10, 20))
            await until(lambda: "index_upload_stopped" in caplog.text)
            assert master.index.num_held(A)[DEVICE] == 10
            assert a.session.alive, "a lease is kept though nothing can be written"
            await client.make_room((await client.status()).revision)
            await until(lambda: master.knows(a))
    finally:
        await client.close()
        etcd.kill()


async def _fill(client: EtcdClient) -> None:
    for _ in range(100):
        await client.put("/x", bytes(200_000))


async def test_blocks_are_visible_soon_after_they_are_stored(client: EtcdClient) -> None:
    master = Master(client)
    loop = asyncio.get_running_loop()
    async with _running(master.reader.run), Worker(client, A).running() as a:
        a.store(DEVICE, [0])
        await until(lambda: master.knows(a))
        a.store(DEVICE, [1])
        started = loop.time()
        await until(lambda: master.knows(a), within_s=2.0)
        assert loop.time() - started >= upload_plan.BATCH_DELAY_S * 0.9
