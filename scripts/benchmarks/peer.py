"""What a block costs that only a peer has: two workers of this machine, each a process.

`ttft_peer`: a prompt whose full blocks are all on the other worker's device, against the same
length cold. `bytes_peer`: the rate of these loads, against as many bytes over a bare connection
between the same two processes, asked in turns. `serving_cost`: decode steps of a batch while
another process fetches without a pause; what fetching takes of the cores is kept out of it, by the
lowest priority.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import Child, running
from benchmarks.report import Row, at_least, at_most, plain
from xllm.model_store import resolve_model

SUMMARY = "blocks from a peer, and what serving them costs"

NUM_PROMPT_TOKENS = 4000
NUM_FULL = NUM_PROMPT_TOKENS // 32
RAW_BYTES = 96 << 20
NUM_SEQS = 8
NUM_STEPS = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each measurement")


def run(options: argparse.Namespace) -> list[Row]:
    folder = resolve_model(None, progress=print)
    return asyncio.run(_measure(folder, options.dtype, options.rounds))


async def _measure(folder: Path, dtype: str, num_rounds: int) -> list[Row]:
    async with (
        _worker(folder, dtype, "serving") as serving,
        _worker(folder, dtype, "fetching") as fetching,
    ):
        rows = await _fetches(serving, fetching, num_rounds)
        rows.append(await _serving_cost(serving, fetching, num_rounds))
    return rows


async def _fetches(serving: _Worker, fetching: _Worker, num_rounds: int) -> list[Row]:
    address = await serving.ask("address")
    port = await serving.ask("raw_listen", RAW_BYTES)
    cold = [(await fetching.ask("ttft", i, NUM_PROMPT_TOKENS, None))["seconds"] for i in range(4)]
    cold_s = median(cold[1:])
    await serving.ask("ttft", 0, NUM_PROMPT_TOKENS, None)
    seconds, rates, raw = [], [], []
    for turn in range(num_rounds + 1):
        raw.append(await fetching.ask("raw_receive", port, RAW_BYTES))
        await fetching.ask("clear")
        fetch = ["serving", address, 0, NUM_FULL]
        hit = await fetching.ask("ttft", 0, NUM_PROMPT_TOKENS, fetch)
        assert hit["remote"] > NUM_PROMPT_TOKENS - 100, hit
        if turn:  # the first one connects
            seconds.append(hit["seconds"])
            rates.append(hit["bytes_per_s"])
    device = [
        (await fetching.ask("ttft", 0, NUM_PROMPT_TOKENS, None))["seconds"]
        for _ in range(num_rounds)
    ]
    gb = 1e9
    return [
        plain("cold", cold_s * 1e3, "ms"),
        plain("ttft_device", median(device) * 1e3, "ms"),
        at_most("ttft_peer", median(seconds) * 1e3, "ms", cold_s * 1e3, 1 / 25),
        at_least("bytes_peer", median(rates) / gb, "GB/s", median(raw[1:]) / gb, 0.6),
    ]


async def _serving_cost(serving: _Worker, fetching: _Worker, num_rounds: int) -> Row:
    address = await serving.ask("address")
    await serving.ask("begin_decoding", NUM_SEQS)
    quiet: list[float] = []
    busy: list[float] = []
    rates: list[float] = []
    for turn in range(num_rounds):
        # In turns, because steps take longer as the contexts grow.
        for is_fetching in (turn % 2 == 0, turn % 2 == 1):
            if is_fetching:
                arguments = (0, NUM_PROMPT_TOKENS, ["serving", address], 1.5)
                fetches = asyncio.create_task(fetching.ask("fetch_on", *arguments))
            await asyncio.sleep(0.3)
            steps = await serving.ask("steps", NUM_STEPS)
            if is_fetching:
                busy += steps
                rates.append(await fetches)
            else:
                quiet += steps
    await serving.ask("end_decoding")
    print(f"serving_cost: {median(rates) / 1e9:.2f} GB/s served meanwhile")
    return at_most("serving_cost", median(busy) * 1e3, "ms/step", median(quiet) * 1e3, 1.10)


class _Worker:
    def __init__(self, child: Child) -> None:
        self._child = child

    async def ask(self, name: str, *arguments: object) -> Any:
        return await self._child.ask([name, arguments])


@asynccontextmanager
async def _worker(folder: Path, dtype: str, name: str) -> AsyncIterator[_Worker]:
    module = "benchmarks.peer_worker"
    async with running(sys.executable, "-m", module, str(folder), dtype, name) as child:
        await child.read()
        yield _Worker(child)
