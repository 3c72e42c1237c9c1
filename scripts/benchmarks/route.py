"""What routing a request costs a master, in CPU time of its process.

A real master and a real etcd; the workers answer at once with one token and publish blocks, so that
each prompt has a prefix that some of them hold. `route_text` sends prompts as text; tokenizing the
same texts alone is `tokenize`, and what is left is `route_rest`. `route_ids` sends token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import aiohttp
import psutil
import uvloop

from benchmarks.instant_workers import InstantWorker, instant_workers
from benchmarks.report import Row, limited, plain
from tests.e2e.processes import Etcd, Launcher, Master, launcher
from tests.golden.prompts import prose_prompt
from xllm.coordination import EtcdClient
from xllm.model_store import resolve_model
from xllm.protocol import ModelCard
from xllm.tokenizer import Tokenizer, read_tokenizer_files

SUMMARY = "CPU time of a master per routed request"

_CONCURRENCY = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4000, help="of each prompt")
    parser.add_argument("--requests", type=int, default=400, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8)


def run(options: argparse.Namespace) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="xllm-bench-") as folder,
        launcher(Path(folder)) as procs,
    ):
        return uvloop.run(_run(options, procs, procs.etcd()))


async def _run(options: argparse.Namespace, procs: Launcher, etcd: Etcd) -> list[Row]:
    folder = resolve_model(None, progress=print)
    tokenizer = Tokenizer.from_folder(folder)
    prompts = _Prompts(options.tokens, tokenizer)
    card = ModelCard(model_id="m", max_model_len=1 << 17, vocab_size=49152, created=0)
    client = EtcdClient([etcd.address])
    await client.connect(5.0)
    master = await asyncio.to_thread(procs.master, etcd)
    try:
        async with instant_workers(
            client, options.workers, card, read_tokenizer_files(folder)
        ) as workers:
            return await _measure(options, prompts, tokenizer, workers, master)
    finally:
        await client.close()


class _Prompts:
    """Texts of about so many tokens: half of each is one of eight beginnings."""

    def __init__(self, num_tokens: int, tokenizer: Tokenizer) -> None:
        ids = prose_prompt(num_tokens * 4, 1, tokenizer.encode)
        rng = random.Random(1)
        half = num_tokens // 2
        self.beginnings = [ids[i * 32 : i * 32 + half] for i in range(8)]
        self._rests = [
            tokenizer.decode(ids[start : start + half])
            for start in rng.sample(range(len(ids) - half), 64)
        ]
        self._texts = [tokenizer.decode(beginning) for beginning in self.beginnings]
        self._numbers = itertools.count()

    def next(self) -> str:
        number = next(self._numbers)
        beginning = self._texts[number % len(self._texts)]
        return f"{beginning} {number} {self._rests[number % len(self._rests)]}"


async def _measure(
    options: argparse.Namespace,
    prompts: _Prompts,
    tokenizer: Tokenizer,
    workers: Sequence[InstantWorker],
    master: Master,
) -> list[Row]:
    for number, worker in enumerate(workers):
        worker.hold(prompts.beginnings[number % 3 :])
    url = f"{master.http_url}/v1/completions"
    process = psutil.Process(master.popen.pid)
    text_s: list[float] = []
    ids_s: list[float] = []
    tokenize_s: list[float] = []
    num_tokens = 0
    async with aiohttp.ClientSession() as session:
        await _until_ready(session, master.http_url)
        await _cpu_s(session, process, url, [prompts.next() for _ in range(40)])
        for _ in range(options.rounds):
            texts = [prompts.next() for _ in range(options.requests)]
            text_s.append(await _cpu_s(session, process, url, texts) / len(texts))
            texts = [prompts.next() for _ in range(options.requests)]
            encoded, seconds = await asyncio.to_thread(_encode, tokenizer, texts)
            tokenize_s.append(seconds / len(texts))
            ids_s.append(await _cpu_s(session, process, url, encoded) / len(texts))
            num_tokens = sum(map(len, encoded)) // len(encoded)
    rest_ms = (median(text_s) - median(tokenize_s)) * 1e3
    return [
        plain("prompt", num_tokens, "tokens"),
        limited("route_text", median(text_s) * 1e3, "ms", 4.0),
        plain("tokenize", median(tokenize_s) * 1e3, "ms"),
        limited("route_rest", rest_ms, "ms", 0.6),
        plain("route_ids", median(ids_s) * 1e3, "ms"),
    ]


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], float]:
    """On a thread, because the workers' streams have to be answered meanwhile."""
    before = time.thread_time()
    encoded = [tokenizer.encode(text, True) for text in texts]
    return encoded, time.thread_time() - before


async def _until_ready(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(30):
        while True:
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.1)
    # The index arrives within a second.
    await asyncio.sleep(2)


async def _cpu_s(
    session: aiohttp.ClientSession,
    process: psutil.Process,
    url: str,
    prompts: Sequence[str | list[int]],
) -> float:
    """CPU time of the master for all of them."""
    left = iter(prompts)

    async def send() -> None:
        for prompt in left:
            body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                await response.read()

    before = process.cpu_times()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(_CONCURRENCY):
            tasks.create_task(send())
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system)
