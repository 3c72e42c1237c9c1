"""What a block costs that only the shared store has: a real pool on Mooncake Store, over TCP.

`ttft_store`: a prompt whose full blocks are all in the pool, against the same length cold, beside
the same prompt from a peer, from disk and from the device. `store_rate`: the rate of these loads,
checked and on the device, against Mooncake's own client that loads the same objects into its own
memory, asked in turns. `ask`: one question for what the pool has of the prompt. `store_cost`:
decode steps of a batch while every block of a full device cache is put, over and over; the pool's
memory stands for another machine, so it only gets what nobody else wants of the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import Child, running
from benchmarks.report import Row, at_least, at_most, plain
from tests.mooncake_pool import MooncakePool, why_not
from xllm.model_store import resolve_model

SUMMARY = "blocks from a shared store, and what putting them there costs"

NUM_PROMPT_TOKENS = 4000
NUM_FULL = NUM_PROMPT_TOKENS // 32
POOL_BYTES = 1 << 30
NUM_SEQS = 8
NUM_STEPS = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each measurement")


def run(options: argparse.Namespace) -> list[Row]:
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"bench pool: {reason}")
    folder = resolve_model(None, progress=print)
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as directory:
        pool = MooncakePool(Path(directory), POOL_BYTES)
        try:
            pool.start()
            return asyncio.run(
                _measure(pool, folder, Path(directory), options.dtype, options.rounds)
            )
        finally:
            pool.close()


async def _measure(
    pool: MooncakePool, folder: Path, directory: Path, dtype: str, num_rounds: int
) -> list[Row]:
    async with (
        _worker(pool, folder, directory, dtype, "one") as one,
        _worker(pool, folder, directory, dtype, "two") as two,
    ):
        rows = await _hits(pool, one, two, num_rounds)
    for thread in pool.thread_ids("memory"):
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    async with _worker(pool, folder, directory, dtype, "three") as alone:
        return [*rows, await _store_cost(alone, num_rounds)]


async def _hits(pool: MooncakePool, one: _Worker, two: _Worker, num_rounds: int) -> list[Row]:
    cold = [await one.timed(seed) for seed in range(100, 104)]
    cold.append(await one.timed(0))
    cold_s = median(item["seconds"] for item in cold[1:])
    await one.ask("settle")
    address = await one.ask("address")
    objects = await one.ask("keys", 0, NUM_PROMPT_TOKENS)
    seconds: dict[str, list[float]] = {name: [] for name in ("store", "peer", "disk", "device")}
    rates: list[float] = []
    limits: list[float] = []
    asks: list[float] = []
    module = "benchmarks.pool_client"
    async with running(sys.executable, "-m", module, pool.address) as client:
        await client.read()
        for turn in range(num_rounds + 1):
            limits.append(await client.ask(objects))
            await two.ask("clear_tiers", ["device", "disk"])
            asked = await two.ask("asked")
            hit = await two.timed(0)
            _check(hit, "remote")
            again = await two.ask("asked")
            await two.ask("settle")
            device = await two.timed(0)
            await two.ask("clear_tiers", ["device"])
            disk = await two.timed(0)
            _check(disk, "disk")
            await two.ask("clear_tiers", ["device", "disk"])
            fetch = ["one", address, 0, NUM_FULL]
            peer = await two.ask("ttft", 0, NUM_PROMPT_TOKENS, fetch)
            assert peer["remote"] > NUM_PROMPT_TOKENS - 100, peer
            if turn:  # the first one connects
                rates.append(hit["store_bytes_per_s"])
                seconds["store"].append(hit["seconds"])
                seconds["peer"].append(peer["seconds"])
                seconds["disk"].append(disk["seconds"])
                seconds["device"].append(device["seconds"])
            if again["num_asks"] > asked["num_asks"]:
                asks.append(again["seconds"] - asked["seconds"])
    gb = 1e9
    cold_ms = cold_s * 1e3
    return [
        plain("cold", cold_ms, "ms"),
        at_most("ttft_store", median(seconds["store"]) * 1e3, "ms", cold_ms, 1 / 20),
        *(
            at_most(f"ttft_{name}", median(seconds[name]) * 1e3, "ms", cold_ms, None)
            for name in ("peer", "disk", "device")
        ),
        plain("ask", median(asks) * 1e3, "ms"),
        at_least("store_rate", median(rates) / gb, "GB/s", median(limits[1:]) / gb, 0.7),
    ]


def _check(hit: dict[str, Any], tier: str) -> None:
    assert hit["by_tier"].get(tier, 0) > NUM_PROMPT_TOKENS - 100, hit


async def _store_cost(worker: _Worker, num_rounds: int) -> Row:
    await worker.timed(1)
    await worker.ask("settle")
    await worker.ask("begin_decoding", NUM_SEQS)
    quiet: list[float] = []
    busy: list[float] = []
    rates: list[float] = []
    for turn in range(num_rounds):
        # In turns, because steps take longer as the contexts grow.
        for is_putting in (turn % 2 == 0, turn % 2 == 1):
            if is_putting:
                answer = await worker.ask("steps_beside_puts", NUM_STEPS)
                busy += answer["steps"]
                rates.append(answer["bytes_per_s"])
                await worker.ask("settle")
            else:
                quiet += await worker.ask("steps", NUM_STEPS)
    await worker.ask("end_decoding")
    print(f"store_cost: {median(rates) / 1e9:.2f} GB/s put meanwhile")
    return at_most("store_cost", median(busy) * 1e3, "ms/step", median(quiet) * 1e3, 1.10)


class _Worker:
    def __init__(self, child: Child) -> None:
        self._child = child

    async def ask(self, name: str, *arguments: object) -> Any:
        return await self._child.ask([name, arguments])

    async def timed(self, seed: int) -> Any:
        return await self.ask("timed", seed, NUM_PROMPT_TOKENS)


@asynccontextmanager
async def _worker(
    pool: MooncakePool, folder: Path, directory: Path, dtype: str, name: str
) -> AsyncIterator[_Worker]:
    module = "benchmarks.pool_worker"
    disk = directory / name
    async with running(
        *(sys.executable, "-m", module, str(folder), dtype, name, str(disk), pool.address)
    ) as child:
        await child.read()
        worker = _Worker(child)
        await worker.ask("settle")
        yield worker
