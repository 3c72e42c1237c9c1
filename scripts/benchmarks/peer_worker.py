"""One worker of `scripts/bench peer`: an engine that serves its blocks, told what to do on stdin.

MODEL_FOLDER DTYPE NAME      one JSON object a line in, one out; "ready" comes first
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.tiers_engine import BenchEngine
from xllm.cache.host_tier import HostMemoryBlocks
from xllm.cache.memory import map_pages, populate
from xllm.cache.mover import Mover, Transfer
from xllm.cache.peer_client import PeerClient, PeerLimits
from xllm.cache.peer_fetch import Peer, PeerFetch
from xllm.cache.peer_server import PeerServer
from xllm.cache.store_process import StoreAddress
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.lower_tiers import LowerTiersFactory, peer_layout
from xllm.engine.runner import Runner
from xllm.main import SWITCH_INTERVAL_S
from xllm.protocol import FetchRange, WorkerId

BLOCKS_PER_FETCH = 5
"""Of a load: 4 MB."""


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    """The same in every process."""
    return [int(t) for t in np.random.default_rng(seed).integers(100, 40_000, num_tokens)]


class Worker:
    """What can be asked; each public coroutine is a command."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        name: str,
        *,
        store: StoreAddress | None = None,
        **tiers: Any,
    ) -> None:
        config = EngineConfig(dtype=dtype, max_cache_size=1 << 30, prefetch_timeout=60_000, **tiers)
        self._name = WorkerId(name)
        runner = Runner(config, folder)
        factory = LowerTiersFactory(runner, peer_id=self._name, store=store)
        self._engine = Engine(runner, factory)
        self._bench = BenchEngine(self._engine)
        self._layout = peer_layout(runner, self._engine.root)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._decoding = AsyncExitStack()
        self._raw: tuple[asyncio.Transport, _RawReceiver] | None = None

    async def start(self) -> None:
        await self._engine.start()
        tiers = self._engine.tiers
        assert tiers is not None
        assert tiers.lender is not None
        engine, lender = self._engine, tiers.lender
        PeerServer(
            self._name, self._layout, lender, engine.books, is_busy=lambda: engine.is_busy
        ).start(self._listening)

    async def address(self) -> str:
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    async def ttft(self, seed: int, num_tokens: int, fetch: list[Any] | None) -> dict[str, Any]:
        """The seconds of a prompt, where its blocks came from, and what loading them took."""
        ranges = [FetchRange(*item) for item in [fetch] if item is not None]
        served = await self._bench.ttft(prompt_of(seed, num_tokens), fetch=ranges)
        return {
            "seconds": served.seconds,
            "remote": served.by_tier.get("remote", 0),
            "bytes_per_s": served.load_bytes / served.load_seconds if served.load_seconds else 0,
        }

    async def clear(self) -> None:
        await self._engine.call(lambda: self._engine.cache_admin.clear(None))

    async def begin_decoding(self, num_seqs: int) -> None:
        await self._decoding.enter_async_context(self._bench.decoding(num_seqs))

    async def steps(self, num_steps: int) -> list[float]:
        return await self._bench.step_seconds(num_steps, is_writing=False)

    async def end_decoding(self) -> None:
        await self._decoding.aclose()

    async def fetch_on(self, seed: int, num_tokens: int, peer: list[str], seconds: float) -> float:
        """Fetches a prompt's blocks over and over, on a thread that only gets what nobody else
        wants of the cores: it stands for another machine. -> bytes per second."""
        names = self._engine.kv_cache.name_prompt(prompt_of(seed, num_tokens), "")
        return await asyncio.to_thread(
            self._fetch_on, names, Peer(WorkerId(peer[0]), peer[1]), seconds
        )

    def _fetch_on(self, names: list[Any], peer: Peer, seconds: float) -> float:
        block_bytes = self._layout.block_bytes
        memory = map_pages(len(names) * block_bytes)
        populate(memory)
        device = HostMemoryBlocks(memory.reshape(len(names), block_bytes))
        mover = Mover(1)
        limits = PeerLimits(stall_s=60.0)  # at this priority, it is this side that stands still
        client = PeerClient(self._name, self._layout, device, mover, limits)
        num_bytes = 0
        deadline = time.monotonic() + seconds
        started = time.perf_counter()
        while time.monotonic() < deadline:
            num_left = 0
            for start in range(0, len(names), BLOCKS_PER_FETCH):
                some = range(start, min(start + BLOCKS_PER_FETCH, len(names)))
                fetch = PeerFetch(peer, [names[i] for i in some], some, time.monotonic() + 60)
                client.start(fetch, mover.open_elsewhere(_ignore, lambda: False))
                num_left += 1
            if not num_bytes:
                thread_id = client.thread.native_id
                assert thread_id is not None
                os.sched_setscheduler(thread_id, os.SCHED_IDLE, os.sched_param(0))
            while num_left:
                for transfer in mover.take_ended(wait_s=10):
                    assert transfer.error is None, transfer.error
                    num_left -= 1
            num_bytes += len(names) * block_bytes
        rate = num_bytes / (time.perf_counter() - started)
        client.close(1.0)
        mover.close(1.0)
        return rate

    # The bare loopback between the same two processes

    async def raw_listen(self, num_bytes: int) -> int:
        """Sends so many bytes for each byte that it gets; returns the port."""
        listening = socket.create_server(("127.0.0.1", 0))
        source = map_pages(num_bytes)
        populate(source)
        threading.Thread(target=_send_raw, args=(listening, source), daemon=True).start()
        return int(listening.getsockname()[1])

    async def raw_receive(self, port: int, num_bytes: int) -> float:
        """-> bytes per second, into memory that is there already."""
        if self._raw is None:
            self._raw = await asyncio.get_running_loop().create_connection(
                lambda: _RawReceiver(num_bytes), "127.0.0.1", port
            )
        transport, receiver = self._raw
        receiver.begin()
        started = time.perf_counter()
        transport.write(b"!")
        await receiver.is_complete.wait()
        return num_bytes / (time.perf_counter() - started)


class _RawReceiver(asyncio.BufferedProtocol):
    def __init__(self, num_bytes: int) -> None:
        self._pages = map_pages(num_bytes)
        populate(self._pages)
        self._filled = 0
        self.is_complete = asyncio.Event()

    def begin(self) -> None:
        self._filled = 0
        self.is_complete.clear()

    def get_buffer(self, sizehint: int) -> memoryview:
        # Asked for before every attempt to read, also before the one that finds nothing.
        return self._pages.data[self._filled :] or memoryview(bytearray(1))

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == self._pages.nbytes:
            self.is_complete.set()


def _send_raw(listening: socket.socket, source: Any) -> None:
    connected, _ = listening.accept()
    while connected.recv(1):
        connected.sendall(source.data)


def _ignore(transfer: Transfer) -> None:
    pass


async def serve(worker: Worker) -> None:
    """Answers what is asked on standard input, until that is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    await worker.start()
    print(json.dumps("ready"), file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, arguments = json.loads(line)
        print(json.dumps(await getattr(worker, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in a worker
    uvloop.run(serve(Worker(Path(sys.argv[1]), *sys.argv[2:])))
    os._exit(0)
