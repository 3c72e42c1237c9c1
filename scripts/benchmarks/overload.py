"""Ten times what a worker can do: how much of its best it still does, and how it is afterwards.

The worker has one core for itself; the crowd, etcd and the master have the others, so that a crowd
does not take the worker's time from it. `goodput` counts requests answered whole, per second,
against as many clients as fit its batch. Afterwards a request is asked every quarter of a second:
`recovery` is when one is answered as quickly as before the crowd came.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import psutil
import uvloop

from benchmarks.report import Row, at_least, limited, plain
from tests.e2e.processes import Launcher, Master, launcher

SUMMARY = "what is left of a worker's throughput under ten times as much"

_BATCH = 16
_USUAL = 1.5
"""Times the usual latency: as before."""
_PROMPT = "Tell me a story about the sea. Number"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--max_tokens", type=int, default=32)


def run(options: argparse.Namespace) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="xllm-bench-") as folder,
        launcher(Path(folder)) as procs,
    ):
        return uvloop.run(_measure(options, _start(procs)))


def _start(procs: Launcher) -> Master:
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) > 1, "needs two cores"
    os.sched_setaffinity(0, cores[1:])
    etcd = procs.etcd()
    master = procs.master(etcd)
    with _on_cores(cores[:1]):
        procs.worker(etcd, "--num_threads=1", f"--max_seqs_per_batch={_BATCH}")
    return master


@contextmanager
def _on_cores(cores: list[int]) -> Iterator[None]:
    """Processes that are started in here stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class _Crowd:
    session: aiohttp.ClientSession
    url: str
    max_tokens: int
    served_s: list[float] = field(default_factory=list)
    """Latencies of what was answered."""
    refused_s: list[float] = field(default_factory=list)
    num_failed: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def ask(self) -> float | None:
        """Seconds until a whole answer; None: refused."""
        body = {
            "model": "SmolLM2-135M-Instruct",
            "prompt": f"{_PROMPT} {next(self._numbers)}",
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
        }
        started = time.perf_counter()
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            await response.read()
            seconds = time.perf_counter() - started
            if response.status == 200:
                self.served_s.append(seconds)
                return seconds
            if response.status == 429 and "Retry-After" in response.headers:
                self.refused_s.append(seconds)
            else:
                self.num_failed += 1
            return None

    async def closed_loop(self, num_clients: int, seconds: float) -> float:
        """Answers per second to so many clients."""
        end = time.perf_counter() + seconds
        before = len(self.served_s)

        async def client() -> None:
            while time.perf_counter() < end:
                await self.ask()

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return (len(self.served_s) - before) / (time.perf_counter() - began)

    async def open_loop(
        self, rate: float, seconds: float
    ) -> tuple[float, list[asyncio.Task[None]]]:
        """Answers per second in the second half of the time; and the requests still open."""
        tasks: list[asyncio.Task[None]] = []
        began = due = time.perf_counter()
        before = None
        while (now := time.perf_counter()) < began + seconds:
            if before is None and now > began + seconds / 2:
                before = (now, len(self.served_s))
            tasks.append(asyncio.create_task(self._ask_once()))
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        assert before is not None
        served = (len(self.served_s) - before[1]) / (time.perf_counter() - before[0])
        return served, [task for task in tasks if not task.done()]

    async def _ask_once(self) -> None:
        await self.ask()


async def _measure(options: argparse.Namespace, master: Master) -> list[Row]:
    process = psutil.Process(master.popen.pid)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        crowd = _Crowd(session, master.http_url, options.max_tokens)
        await crowd.closed_loop(_BATCH, 3.0)
        best = await crowd.closed_loop(_BATCH, options.seconds)
        usual_s = median([s for _ in range(5) if (s := await crowd.ask()) is not None])
        memory = process.memory_info().rss
        crowd.refused_s.clear()
        served, still_open = await crowd.open_loop(options.factor * best, options.seconds)
        gone_at = time.perf_counter()
        grown = process.memory_info().rss - memory
        recovery_s = await _recovery_s(crowd, usual_s, gone_at)
        await asyncio.gather(*still_open)
    return [
        plain("best", best, "requests/s"),
        at_least("goodput", served, "requests/s", best, 0.9),
        plain("refused", len(crowd.refused_s) / options.seconds, "requests/s"),
        plain("refusal", median(crowd.refused_s or [0.0]) * 1e3, "ms"),
        limited("failed", crowd.num_failed, "requests", 0),
        limited("recovery", recovery_s, "s", 5.0),
        plain("master_grown", grown / 2**20, "MiB"),
    ]


async def _recovery_s(crowd: _Crowd, usual_s: float, gone_at: float) -> float:
    """Since `gone_at`, until the first request that is answered in about `usual_s` was sent."""
    while True:
        sent_at = time.perf_counter()
        seconds = await crowd.ask()
        if seconds is not None and seconds <= _USUAL * usual_s + 0.05:
            return sent_at - gone_at
        await asyncio.sleep(0.25)
