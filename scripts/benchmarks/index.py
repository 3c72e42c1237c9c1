"""The master's index: how quickly it learns, answers, and how much memory it takes.

`apply`: block events per second from decoded batches, half STORED and half REMOVED, on an index of
`--blocks` blocks; `apply_growing` while it fills from empty; `decode` adds the decoding. `match`:
one prompt of 64 blocks against 32 workers that each hold a prefix of another length; in
`match_equal` all hold all of it, in `match_tiers` the rest of each prefix is on disk. `memory` is
what the process grew by, divided by the blocks. `visible`: from a commit on one of 8 workers to the
index of a master, over etcd; see `index_visible.py`. The machine may be shared: rates are per
second of CPU time, and of the latencies of `match` the least counts.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.index_visible import measure_visible
from benchmarks.report import Row, at_least, limited, plain
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode, decode_delta, encode_delta
from xllm.cache.index import CacheIndex
from xllm.protocol import WorkerId

SUMMARY = "block events applied, prompts matched, and bytes per block of the master's index"

_NUM_WORKERS = 64
_BATCH_BLOCKS = 256
_PROMPT_BLOCKS = 64
_MATCH_WORKERS = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=1_000_000, help="in the index")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of `visible`")


def run(options: argparse.Namespace) -> list[Row]:
    bytes_per_block = _in_fresh_process(_measure_memory, options.blocks)
    return [
        *_measure_apply(options.blocks, options.rounds),
        *_measure_match(options.rounds),
        limited("memory", bytes_per_block, "bytes/block", 250.0),
        *measure_visible(options.seconds),
    ]


def _measure_apply(num_blocks: int, rounds: int) -> list[Row]:
    rng = random.Random(1)
    index = CacheIndex()
    first = _batches(rng, num_blocks)
    gc.collect()
    growing = _rate(lambda: _apply_all(index, first), num_blocks)
    steady = decoded = 0.0
    oldest = first
    for _ in range(rounds):
        # Each worker stores what is new and drops as much of what it had.
        newest = _batches(rng, num_blocks // 8)
        replaced = oldest[: len(newest)]
        oldest = oldest[len(newest) :] + newest
        changes = [
            (worker, EventBatch((_section(BlockEventKind.REMOVED, old), *new.sections)))
            for (worker, new), (_, old) in zip(newest, replaced, strict=True)
        ]
        values = [(worker, encode_delta(batch)) for worker, batch in changes]
        num_events = sum(batch.num_blocks for _, batch in changes)
        steady = max(steady, _rate(lambda changes=changes: _apply_all(index, changes), num_events))
        decoded = max(decoded, _rate(lambda values=values: _decode_all(values), num_events))
    together = 1 / (1 / steady + 1 / decoded)
    return [
        at_least("apply", steady, "events/s", 1e6, 1.0),
        plain("apply_growing", growing, "events/s"),
        plain("decode_and_apply", together, "events/s"),
    ]


def _measure_match(rounds: int) -> list[Row]:
    rng = random.Random(2)
    index = CacheIndex()
    _apply_all(index, _batches(rng, 100_000))
    workers = [WorkerId(f"w{i}") for i in range(_MATCH_WORKERS)]
    staggered, equal, tiered = (_hashes(rng, _PROMPT_BLOCKS) for _ in range(3))
    for i, worker in enumerate(workers):
        length = (i + 1) * _PROMPT_BLOCKS // _MATCH_WORKERS
        index.apply(worker, _stored(staggered[:length]))
        index.apply(worker, _stored(equal))
        index.apply(worker, _stored(tiered[:length]))
        index.apply(worker, _stored(tiered[length:], TierCode.DISK))
    return [
        limited("match", _least_us(lambda: index.match(staggered), rounds), "us", 25.0),
        plain("match_equal", _least_us(lambda: index.match(equal), rounds), "us"),
        plain("match_tiers", _least_us(lambda: index.match(tiered), rounds), "us"),
    ]


def _measure_memory(num_blocks: int) -> float:
    rng = random.Random(3)
    index = CacheIndex()
    gc.collect()
    before = _resident_bytes()
    for _ in range(num_blocks // (_BATCH_BLOCKS * _NUM_WORKERS)):
        _apply_all(index, _batches(rng, _BATCH_BLOCKS * _NUM_WORKERS))
    gc.collect()
    return (_resident_bytes() - before) / index.statistics().num_copies


def _in_fresh_process(measure: Callable[[int], float], argument: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (argument,))


def _resident_bytes() -> int:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * 4096


def _batches(rng: random.Random, num_blocks: int) -> list[tuple[WorkerId, EventBatch]]:
    """Different blocks, in turn to each worker."""
    return [
        (WorkerId(f"w{i % _NUM_WORKERS}"), _stored(_hashes(rng, _BATCH_BLOCKS)))
        for i in range(num_blocks // _BATCH_BLOCKS)
    ]


def _hashes(rng: random.Random, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", rng.randbytes(8 * count))


def _stored(hashes: Sequence[int], tier: TierCode = TierCode.DEVICE) -> EventBatch:
    return EventBatch((Section(tier, BlockEventKind.STORED, hashes),))


def _section(kind: BlockEventKind, batch: EventBatch) -> Section:
    return Section(TierCode.DEVICE, kind, batch.sections[0].hashes)


def _apply_all(index: CacheIndex, batches: Sequence[tuple[WorkerId, EventBatch]]) -> None:
    for worker, batch in batches:
        index.apply(worker, batch)


def _decode_all(values: Sequence[tuple[WorkerId, bytes]]) -> None:
    for _, value in values:
        decode_delta(value)


def _rate(work: Callable[[], None], num_events: int) -> float:
    started = time.process_time()
    work()
    return num_events / (time.process_time() - started)


def _least_us(work: Callable[[], object], rounds: int) -> float:
    least = float("inf")
    for _ in range(rounds * 200):
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least * 1e6
