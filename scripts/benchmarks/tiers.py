"""What a block that left the device costs: hits in host and disk against computing and the machine.

`ttft_host`, `ttft_disk`, `ttft_disk_restart`: a prompt whose full blocks are all in that tier,
against the same prompt cold; and the rate of its load against memcpy and against sequential direct
reads of a plain file, asked in turns with the hits. `decode_under_writes`: steps of a batch while
every block of a full device cache is stored to host and disk over and over. `no_reuse`: prompts
without a common prefix, on an engine with all tiers and on one with none.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import uvloop

from benchmarks.report import Row, at_least, at_most, limited, plain
from benchmarks.tiers_engine import BenchEngine, random_prompt, running
from xllm.cache.disk_tier import DiskTier, DiskTierConfig
from xllm.cache.eviction import EvictionPolicyName
from xllm.cache.memory import map_pages, populate
from xllm.cache.slab import SlabFile
from xllm.cache.slab_format import SlabGeometry, SlotRecord, encode_header
from xllm.cache.tier import TierName
from xllm.config import EngineConfig
from xllm.main import SWITCH_INTERVAL_S
from xllm.model_store import resolve_model
from xllm.protocol import BlockHash

SUMMARY = "hits in host and disk, and what writing there costs others"

NUM_PROMPT_TOKENS = 4000
NUM_SLOTS = 100_000
READ_BYTES = 4 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each hit and its limit")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; a temporary one")


def run(options: argparse.Namespace) -> list[Row]:
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in a worker
    parent = options.directory
    with tempfile.TemporaryDirectory(prefix="xllm-bench-", dir=parent) as directory:
        bench = _Bench(options, Path(directory))
        rows = uvloop.run(bench.run())
        return [*rows, _index_slots(Path(directory))]


class _Bench:
    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._rounds: int = options.rounds
        self._directory = directory
        self._folder = resolve_model(None, progress=print)
        self._off = EngineConfig(dtype=options.dtype, max_cache_size=1 << 30)
        self._on = replace(
            self._off,
            host_cache_size=1 << 30,
            disk_cache_dir=str(directory / "blocks"),
            disk_cache_size=1 << 30,
        )
        self._all = replace(self._on, disk_write_policy="write_through", prefetch_timeout=60_000)

    async def run(self) -> list[Row]:
        prompt = random_prompt(NUM_PROMPT_TOKENS)
        async with running(self._all, self._folder) as engine:
            rows, cold_s = await self._hits(engine, prompt)
        async with running(self._all, self._folder) as engine:
            restarted = await engine.ttft(prompt)
        assert restarted.by_tier.get(TierName.DISK, 0) > NUM_PROMPT_TOKENS - 100
        rows.append(_ttft("ttft_disk_restart", restarted.seconds, cold_s, 25))
        async with running(self._all, self._folder) as engine:
            rows.append(await _decode_under_writes(engine, self._rounds))
        shutil.rmtree(self._directory / "blocks")
        async with (
            running(self._on, self._folder) as with_tiers,
            running(self._off, self._folder) as without,
        ):
            rows.append(await _no_reuse(with_tiers, without, self._rounds))
        return rows

    async def _hits(self, engine: BenchEngine, prompt: list[int]) -> tuple[list[Row], float]:
        probe = _Probe(self._directory, engine.block_bytes)
        await engine.ttft(random_prompt(NUM_PROMPT_TOKENS))
        cold = [await engine.ttft(random_prompt(NUM_PROMPT_TOKENS)) for _ in range(2)]
        cold.append(await engine.ttft(prompt))
        cold_s = median(hit.seconds for hit in cold)
        await engine.settle()
        device, ttft, rates, limits = [], _by_tier(), _by_tier(), _by_tier()
        for _ in range(self._rounds):
            device.append((await engine.ttft(prompt)).seconds)
            for tier, measure in ((TierName.HOST, probe.copy), (TierName.DISK, probe.read)):
                limits[tier].append(await asyncio.to_thread(measure))
                await engine.clear_above(tier)
                hit = await engine.ttft(prompt)
                assert hit.by_tier.get(tier, 0) > NUM_PROMPT_TOKENS - 100, hit
                ttft[tier].append(hit.seconds)
                rates[tier].append(hit.load_bytes / hit.load_seconds)
                await engine.settle()
        host, disk = TierName.HOST, TierName.DISK
        gb = 1e9
        return [
            plain("cold", cold_s * 1e3, "ms"),
            plain("ttft_device", median(device) * 1e3, "ms"),
            _ttft("ttft_host", median(ttft[host]), cold_s, 50),
            at_least(
                "bytes_host", median(rates[host]) / gb, "GB/s", median(limits[host]) / gb, 0.6
            ),
            _ttft("ttft_disk", median(ttft[disk]), cold_s, 25),
            at_least(
                "bytes_disk", median(rates[disk]) / gb, "GB/s", median(limits[disk]) / gb, 0.7
            ),
        ], cold_s


def _by_tier() -> dict[TierName, list[float]]:
    return {TierName.HOST: [], TierName.DISK: []}


def _ttft(name: str, seconds: float, cold_s: float, speedup: int) -> Row:
    return at_most(name, seconds * 1e3, "ms", cold_s * 1e3, 1 / speedup)


class _Probe:
    """What the machine can do with as many bytes as the prompt's blocks: by memcpy, with as many
    threads as is best, between places that are in no cache, and by reading a plain file in order,
    past the page cache."""

    _NUM_PLACES = 4

    def __init__(self, directory: Path, block_bytes: int) -> None:
        self._num_bytes = NUM_PROMPT_TOKENS // 32 * block_bytes // READ_BYTES * READ_BYTES
        num_bytes = self._NUM_PLACES * self._num_bytes
        self._source, self._target = map_pages(num_bytes), map_pages(num_bytes)
        for pages in (self._source, self._target):
            populate(pages)
        self._place = 0
        self._path = directory / "plain"
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        for offset in range(0, self._num_bytes, READ_BYTES):
            os.pwrite(fd, self._source[offset : offset + READ_BYTES].data, offset)
        os.fsync(fd)
        os.close(fd)

    def copy(self) -> float:
        """Bytes per second."""
        num_cores = len(os.sched_getaffinity(0))
        return max(self._copy_with(num_threads) for num_threads in (1, num_cores))

    def read(self) -> float:
        """Bytes per second."""
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        started = time.perf_counter()
        for offset in range(0, self._num_bytes, READ_BYTES):
            os.preadv(fd, [self._target[offset : offset + READ_BYTES].data], offset)
        seconds = time.perf_counter() - started
        os.close(fd)
        return self._num_bytes / seconds

    def _copy_with(self, num_threads: int) -> float:
        share = self._num_bytes // num_threads

        def copy(start: int) -> None:
            np.copyto(self._target[start : start + share], self._source[start : start + share])

        self._place = (self._place + 1) % self._NUM_PLACES
        first = self._place * self._num_bytes
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(time.sleep, [0.01] * num_threads))  # they are there now
            started = time.perf_counter()
            list(threads.map(copy, range(first, first + share * num_threads, share)))
            return share * num_threads / (time.perf_counter() - started)


async def _decode_under_writes(engine: BenchEngine, num_rounds: int) -> Row:
    """Medians of steps of eight sequences, in turns without and with writes."""
    await engine.ttft(random_prompt(NUM_PROMPT_TOKENS))
    await engine.settle()
    steps: dict[bool, list[float]] = {False: [], True: []}
    stored_bytes, seconds = 0, 0.0
    async with engine.decoding(8):
        for _ in range(num_rounds):
            for is_writing in (False, True):
                before, started = engine.stored_bytes, time.perf_counter()
                steps[is_writing] += await engine.step_seconds(40, is_writing=is_writing)
                if is_writing:
                    stored_bytes += engine.stored_bytes - before
                    seconds += time.perf_counter() - started
                await engine.settle()
    print(f"decode_under_writes: {stored_bytes / seconds / 1e9:.2f} GB/s stored meanwhile")
    quiet, busy = median(steps[False]), median(steps[True])
    return at_most("decode_under_writes", busy * 1e3, "ms/step", quiet * 1e3, 1.10)


async def _no_reuse(with_tiers: BenchEngine, without: BenchEngine, num_rounds: int) -> Row:
    """Seconds of a burst of prompts that share nothing."""

    async def burst(engine: BenchEngine) -> float:
        started = time.perf_counter()
        prompts = [random_prompt(500) for _ in range(8)]
        await asyncio.gather(*(engine.ttft(prompt, max_tokens=32) for prompt in prompts))
        return time.perf_counter() - started

    seconds: dict[BenchEngine, list[float]] = {with_tiers: [], without: []}
    for turn in range(num_rounds + 1):
        for engine in (without, with_tiers) if turn % 2 else (with_tiers, without):
            spent = await burst(engine)
            if turn:
                seconds[engine].append(spent)
    return at_most("no_reuse", median(seconds[with_tiers]), "s", median(seconds[without]), 1.03)


def _index_slots(directory: Path) -> Row:
    """Opens a slab whose every slot holds a block, as at a start."""
    geometry = SlabGeometry(NUM_SLOTS, 4096)
    root = BlockHash(bytes(16))
    config = DiskTierConfig(
        directory=directory / "slots",
        size_bytes=geometry.file_bytes + (1 << 20),
        block_bytes=4096,
        root=root,
        eviction_policy=EvictionPolicyName.GRADED,
    )
    slab = SlabFile(config.directory, config.geometry, root)
    headers = b"".join(
        encode_header(SlotRecord(i, i + 1, BlockHash(i.to_bytes(16, "big")), None, bytes(16)), 4096)
        for i in range(NUM_SLOTS)
    )
    with slab.path.open("r+b") as file:
        file.seek(geometry.header_offset(0))
        file.write(headers)
    slab.close()
    started = time.perf_counter()
    tier = DiskTier(config, clock=time.monotonic)
    seconds = time.perf_counter() - started
    assert tier.table is not None
    assert len(tier.table) >= NUM_SLOTS
    tier.close()
    return limited("index_100k_slots", seconds, "s", 2.0)
