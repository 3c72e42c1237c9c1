"""The conversation trace of Mooncake (Qin et al., FAST'25), as blocks of the simulated size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trace import read_trace

NAMED_TOKENS = 512
"""A name in the trace stands for so many tokens, and all before them."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Arrival:
    number: int
    at: float
    num_tokens: int
    num_output: int
    hashes: tuple[int, ...]
    """Of the full blocks of the prompt, as in the index."""


def read_arrivals(path: Path, block_size: int) -> list[Arrival]:
    """A trace in Mooncake's format, cut into blocks of `block_size` tokens."""
    per_name = NAMED_TOKENS // block_size
    arrivals = []
    for number, request in enumerate(read_trace(path)):
        numbers = [int.from_bytes(name, "little") * per_name for name in request.blocks]
        blocks = [first + i for first in numbers for i in range(per_name)]
        arrivals.append(
            Arrival(
                number,
                request.time_s,
                request.input_length,
                request.output_length,
                tuple(map(scatter, blocks[: request.input_length // block_size])),
            )
        )
    return arrivals


def pooled_reuse(arrivals: Sequence[Arrival], num_blocks: int) -> float:
    """The share of prompt blocks that one LRU cache of this size, shared by all, would have."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for arrival in arrivals:
        prefix = 0
        for block in arrival.hashes:
            if block not in cache:
                break
            prefix += 1
        hits += prefix
        total += len(arrival.hashes)
        for block in reversed(arrival.hashes):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits / total


def scatter(number: int) -> int:
    """Different numbers, spread over 64 bits: the finalizer of SplitMix64 (Steele et al., 2014)."""
    number = (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31
