"""What routing a request costs a master, in CPU time of its process.

A real master and a real etcd; the workers answer at once with one token and publish blocks, so that
each prompt has a prefix that some of them hold: half of it is one of eight beginnings, the rest is
its own. `route_text` sends prompts as text. Tokenizing the same texts alone is `tokenize`; of some
tokens the master remembers the ids (`known`), and what is left when tokenizing the others is taken
off is `route_rest`. `route_ids` sends token ids, and `route_chat` chats of as many tokens, with the
beginnings as their system messages.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
import uvloop

from benchmarks.instant_workers import InstantWorker, instant_workers
from benchmarks.report import Row, limited, plain
from tests.e2e.processes import Etcd, Launcher, Master, launcher
from tests.golden.prompts import prose_prompt
from tests.metrics_page import metric
from xllm.coordination import EtcdClient
from xllm.model_store import resolve_model
from xllm.protocol import ModelCard
from xllm.tokenizer import Tokenizer, read_tokenizer_files

SUMMARY = "CPU time of a master per routed request"

_CONCURRENCY = 4

_Body = dict[str, Any]
"""Of a request, less what all have."""


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
    """Texts of about so many tokens: half of each is one of eight beginnings, and the other half is
    one that no other has."""

    def __init__(self, num_tokens: int, tokenizer: Tokenizer) -> None:
        ids = prose_prompt(num_tokens * 4, 1, tokenizer.encode)
        half = num_tokens // 2
        self._words = tokenizer.decode(ids).split()
        self._num_words = half * len(self._words) // len(ids)
        self._random = random.Random(1)
        self.beginnings = [ids[i * 32 : i * 32 + half] for i in range(8)]
        self._texts = [tokenizer.decode(beginning) for beginning in self.beginnings]
        self._numbers = itertools.count()
        self.chat_beginnings = [
            tokenizer.encode(tokenizer.apply_chat_template([_message("system", text)]), False)
            for text in self._texts
        ]

    def completion(self) -> _Body:
        beginning, rest = self._next()
        return _completion(f"{beginning} {rest}")

    def chat(self) -> _Body:
        beginning, rest = self._next()
        return {"messages": [_message("system", beginning), _message("user", rest)]}

    def _next(self) -> tuple[str, str]:
        number = next(self._numbers)
        beginning = self._texts[number % len(self._texts)]
        rest = " ".join(self._random.choices(self._words, k=self._num_words))
        return beginning, f"{number} {rest}"


def _completion(prompt: str | list[int]) -> _Body:
    return {"prompt": prompt}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


async def _measure(
    options: argparse.Namespace,
    prompts: _Prompts,
    tokenizer: Tokenizer,
    workers: Sequence[InstantWorker],
    master: Master,
) -> list[Row]:
    for number, worker in enumerate(workers):
        worker.hold([*prompts.beginnings[number % 3 :], *prompts.chat_beginnings[number % 3 :]])
    process = psutil.Process(master.popen.pid)
    text_s: list[float] = []
    ids_s: list[float] = []
    chat_s: list[float] = []
    tokenize_s: list[float] = []
    known: list[float] = []
    num_tokens = 0

    async def per_request_s(bodies: Sequence[_Body]) -> float:
        return await _cpu_s(session, process, bodies) / len(bodies)

    async with aiohttp.ClientSession(master.http_url) as session:
        await _until_ready(session)
        await per_request_s([prompts.completion() for _ in range(40)])
        await per_request_s([prompts.chat() for _ in range(40)])
        for _ in range(options.rounds):
            before = await _known_tokens(master)
            text_s.append(await per_request_s(_many(prompts.completion, options.requests)))
            known.append((await _known_tokens(master) - before) / options.requests)
            texts = [body["prompt"] for body in _many(prompts.completion, options.requests)]
            encoded, seconds = await asyncio.to_thread(_encode, tokenizer, texts)
            tokenize_s.append(seconds / len(texts))
            ids_s.append(await per_request_s([_completion(ids) for ids in encoded]))
            chat_s.append(await per_request_s(_many(prompts.chat, options.requests)))
            num_tokens = sum(map(len, encoded)) // len(encoded)
    unknown_share = 1 - median(known) / num_tokens
    rest_ms = (median(text_s) - unknown_share * median(tokenize_s)) * 1e3
    return [
        plain("prompt", num_tokens, "tokens"),
        limited("route_text", median(text_s) * 1e3, "ms", 4.0),
        plain("tokenize", median(tokenize_s) * 1e3, "ms"),
        plain("known", median(known), "tokens"),
        limited("route_rest", rest_ms, "ms", 0.6),
        plain("route_ids", median(ids_s) * 1e3, "ms"),
        limited("route_chat", median(chat_s) * 1e3, "ms", 4.0),
    ]


def _many(make: Callable[[], _Body], number: int) -> list[_Body]:
    return [make() for _ in range(number)]


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[list[int]], float]:
    """On a thread, because the workers' streams have to be answered meanwhile."""
    before = time.thread_time()
    encoded = [tokenizer.encode(text, True) for text in texts]
    return encoded, time.thread_time() - before


async def _known_tokens(master: Master) -> float:
    """Of all prompts so far, how many the master did not tokenize."""
    name = "xllm_tokenizer_cached_tokens_total"
    return await asyncio.to_thread(metric, master.operator_url, name) or 0


async def _until_ready(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(30):
        while True:
            async with session.get("/health") as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.1)
    # The index arrives within a second.
    await asyncio.sleep(2)


async def _cpu_s(
    session: aiohttp.ClientSession, process: psutil.Process, bodies: Sequence[_Body]
) -> float:
    """CPU time of the master for all of them."""
    left = iter(bodies)

    async def send() -> None:
        for body in left:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            one = {"model": "m", "max_tokens": 1, "temperature": 0, **body}
            async with session.post(path, json=one) as response:
                response.raise_for_status()
                await response.read()

    before = process.cpu_times()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(_CONCURRENCY):
            tasks.create_task(send())
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system)
