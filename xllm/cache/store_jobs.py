"""What is asked of the shared store: one job is one request to the agent, or two.

A job is made on the engine's thread and done on a lane's (`store_client.py`), which fills in what
became of each block. `Transfer` (`mover.py`) tells the engine that it has ended.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from xllm.cache.copies import load
from xllm.cache.host_tier import DeviceBlocks
from xllm.cache.slab_format import Buffer
from xllm.cache.store_codes import StoreOutcome, outcome_of
from xllm.cache.store_object import (
    decode_trailer,
    encode_trailer,
    key_of,
    object_bytes,
    slot_stride,
)
from xllm.cache.store_wire import Op, Request
from xllm.errors import StoreUnavailable
from xllm.protocol import BlockHash

Call = Callable[[Request], list[int]]
"""Of the lane. Raises: StoreUnavailable."""


class StoreMemory(Protocol):
    """The slots that worker and agent share, and what is in them."""

    @property
    def prefix(self) -> str:
        """Of the keys."""
        ...

    @property
    def device(self) -> DeviceBlocks: ...

    def slot(self, index: int) -> Buffer:
        """[slot_stride]"""
        ...


class JobState(enum.Enum):
    QUEUED = "queued"
    BEGUN = "begun"
    CANCELLED = "cancelled"


class StoreJob(Protocol):
    state: JobState

    def run(self, memory: StoreMemory, call: Call, slots: Sequence[int]) -> None:
        """On a lane's thread. `slots`: the lane's own. Raises: StoreUnavailable."""
        ...


@dataclass(slots=True, eq=False)
class Ask:
    """Whether blocks are in the store."""

    names: Sequence[BlockHash]
    found: list[bool] = field(default_factory=list)
    """One per name; empty: nobody knows."""
    state: JobState = JobState.QUEUED

    def run(self, memory: StoreMemory, call: Call, slots: Sequence[int]) -> None:
        keys = [key_of(memory.prefix, name) for name in self.names]
        codes = call(Request(Op.EXIST, keys))
        _outcomes(codes)
        self.found = [code == 1 for code in codes]


@dataclass(slots=True, eq=False)
class Get:
    """Blocks from the store to the device; at most as many as a lane has slots."""

    names: Sequence[BlockHash]
    block_ids: Sequence[int]
    outcomes: list[StoreOutcome] = field(default_factory=list)
    """DONE: on the device, and verified."""
    state: JobState = JobState.QUEUED

    def run(self, memory: StoreMemory, call: Call, slots: Sequence[int]) -> None:
        device = memory.device
        size = object_bytes(device.block_bytes)
        slots = slots[: len(self.names)]
        offsets = [slot * slot_stride(device.block_bytes) for slot in slots]
        keys = [key_of(memory.prefix, name) for name in self.names]
        codes = call(Request(Op.GET, keys, offsets, size))
        outcomes = _outcomes(codes)
        arrived: list[tuple[int, Buffer, bytes]] = []
        for i, (code, slot) in enumerate(zip(codes, slots, strict=True)):
            if outcomes[i] is not StoreOutcome.DONE:
                continue
            source = memory.slot(slot)
            trailer = source[device.block_bytes : size]
            checksum = decode_trailer(trailer, self.names[i], device.block_bytes)
            if code != size or checksum is None:
                outcomes[i] = StoreOutcome.CORRUPT
            else:
                arrived.append((i, source, checksum))
        if arrived:
            indices, sources, checksums = zip(*arrived, strict=True)
            block_ids = [self.block_ids[i] for i in indices]
            for i, is_sound in zip(
                indices, load(device, sources, checksums, block_ids), strict=True
            ):
                if not is_sound:
                    outcomes[i] = StoreOutcome.CORRUPT
        self.outcomes = outcomes


@dataclass(frozen=True, slots=True)
class BlockToPut:
    """A block whose bytes are in a slot of the shared memory."""

    name: BlockHash
    slot: int
    checksum: bytes


@dataclass(slots=True, eq=False)
class Put:
    """Blocks into the store; those that are there already are done."""

    blocks: Sequence[BlockToPut]
    outcomes: list[StoreOutcome] = field(default_factory=list)
    state: JobState = JobState.QUEUED

    def run(self, memory: StoreMemory, call: Call, slots: Sequence[int]) -> None:
        block_bytes = memory.device.block_bytes
        for block in self.blocks:
            trailer = encode_trailer(block.name, block.checksum, block_bytes)
            target = memory.slot(block.slot)[block_bytes : object_bytes(block_bytes)]
            target[:] = np.frombuffer(trailer, dtype=np.uint8)
        keys = [key_of(memory.prefix, block.name) for block in self.blocks]
        offsets = [block.slot * slot_stride(block_bytes) for block in self.blocks]
        self.outcomes = _outcomes(call(Request(Op.PUT, keys, offsets, object_bytes(block_bytes))))


@dataclass(slots=True, eq=False)
class Remove:
    """Damaged blocks out of the store, where they would be in the way of sound ones; None: all
    blocks of the cache root."""

    names: Sequence[BlockHash] | None
    state: JobState = JobState.QUEUED

    def run(self, memory: StoreMemory, call: Call, slots: Sequence[int]) -> None:
        if self.names is None:
            _outcomes(call(Request(Op.CLEAR, [memory.prefix])))
        else:
            keys = [key_of(memory.prefix, name) for name in self.names]
            _outcomes(call(Request(Op.REMOVE, keys)))


def _outcomes(codes: list[int]) -> list[StoreOutcome]:
    """Raises: StoreUnavailable if the store's master did not answer."""
    outcomes = [outcome_of(code) for code in codes]
    if StoreOutcome.UNREACHABLE in outcomes:
        raise StoreUnavailable("the store's master does not answer")
    return outcomes
