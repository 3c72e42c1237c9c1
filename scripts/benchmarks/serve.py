"""What the master costs: the same requests through it, and straight to the workers.

`ttft_added`: a short prompt at concurrency 1. `throughput_kept`: streamed tokens per second of
two workers at concurrency 32, the requests spread evenly in both cases. The workers reached
directly are separate processes with the same flags; while one side is measured the other idles.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import aiohttp
import orjson
import uvloop

from benchmarks.report import Row, at_least, limited, plain
from tests.e2e.processes import Launcher, launcher

SUMMARY = "time to first token and throughput through the master against directly"

_PROMPT = "Write a long story about a lighthouse keeper and the sea. Number"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=64, help="per throughput measurement")
    parser.add_argument("--max_tokens", type=int, default=64, help="per request of the throughput")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")


def run(options: argparse.Namespace) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="xllm-bench-") as folder,
        launcher(Path(folder)) as procs,
    ):
        through_master, direct = _start(procs)
        return uvloop.run(_measure(options, through_master, direct))


def _start(procs: Launcher) -> tuple[list[str], list[str]]:
    """Returns the base URLs of the master, and of the two workers that serve the API themselves."""
    etcd = procs.etcd()
    master = procs.master(etcd, "--load_balance_policy=RR")
    num_threads = max(1, len(os.sched_getaffinity(0)) // 2)
    shared = [f"--num_threads={num_threads}", "--max_cache_size=1GiB"]
    direct = []
    for _ in range(2):
        procs.worker(etcd, *shared)
        direct.append(procs.worker(None, *shared, "--enable_service_routing=false").http_url)
    _wait_for_workers(master.http_url, 2)
    return [master.http_url], direct


def _wait_for_workers(url: str, num_workers: int) -> None:
    async def seen() -> None:
        workers: set[str] = set()
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while len(workers) < num_workers:
                body = {"prompt": "a", "max_tokens": 1}
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    workers.add(response.headers.get("x-xllm-worker-id", ""))

    uvloop.run(seen())


async def _measure(
    options: argparse.Namespace, through_master: list[str], direct: list[str]
) -> list[Row]:
    sides = {"master": through_master, "direct": direct}
    ttft: dict[str, list[float]] = {side: [] for side in sides}
    throughput: dict[str, list[float]] = {side: [] for side in sides}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        for urls in sides.values():
            await _throughput(session, urls, 32, 8)
        for _ in range(options.rounds):
            for side, urls in sides.items():
                for _ in range(10):
                    ttft[side].append(await _ttft(session, urls[0]))
            for side, urls in sides.items():
                rate = await _throughput(session, urls, options.requests, options.max_tokens)
                throughput[side].append(rate)
    added_ms = (median(ttft["master"]) - median(ttft["direct"])) * 1e3
    return [
        plain("ttft_direct", median(ttft["direct"]) * 1e3, "ms"),
        limited("ttft_added", added_ms, "ms", 5.0),
        at_least(
            "throughput_kept",
            median(throughput["master"]),
            "tokens/s",
            median(throughput["direct"]),
            0.9,
        ),
    ]


_counter = itertools.count()


async def _ttft(session: aiohttp.ClientSession, url: str) -> float:
    started = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=_body(4)) as response:
        response.raise_for_status()
        await response.content.readany()
        seconds = time.perf_counter() - started
        await response.read()
    return seconds


async def _throughput(
    session: aiohttp.ClientSession, urls: Sequence[str], num_requests: int, max_tokens: int
) -> float:
    """Output tokens per second at concurrency 32."""
    targets = itertools.cycle(urls)
    limit = asyncio.Semaphore(32)
    num_tokens = 0

    async def one() -> None:
        nonlocal num_tokens
        async with (
            limit,
            session.post(f"{next(targets)}/v1/completions", json=_body(max_tokens)) as response,
        ):
            response.raise_for_status()
            body = await response.read()
        usage = orjson.loads(body.split(b"data: ")[-2])["usage"]
        num_tokens += usage["completion_tokens"]

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(num_requests):
            group.create_task(one())
    return num_tokens / (time.perf_counter() - started)


def _body(max_tokens: int) -> dict[str, object]:
    return {
        "prompt": f"{next(_counter)} {_PROMPT}",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
