"""What a shared store may answer: objects, and codes, that are nearly right."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from tests.fuzz.mutate import mutate_bytes, random_bytes
from tests.fuzz.runner import Target
from xllm.cache.host_tier import HostMemoryBlocks
from xllm.cache.slab_format import Buffer, checksum_of
from xllm.cache.store_codes import StoreOutcome
from xllm.cache.store_jobs import Get
from xllm.cache.store_object import encode_trailer, object_bytes, slot_stride
from xllm.cache.store_wire import Request
from xllm.errors import StoreUnavailable
from xllm.protocol import BlockHash

_BLOCK_BYTES = 64
_SIZE = object_bytes(_BLOCK_BYTES)
_NAMES = [BlockHash(bytes([i]) * 16) for i in range(3)]
_PAYLOADS = [np.full(_BLOCK_BYTES, i + 1, dtype=np.uint8) for i in range(3)]
_OBJECTS = [
    payload.tobytes() + encode_trailer(name, checksum_of(payload), _BLOCK_BYTES)
    for name, payload in zip(_NAMES, _PAYLOADS, strict=True)
]


class _Answer(NamedTuple):
    codes: list[int]
    objects: list[bytes]


class StoreObjectTarget(Target):
    """A block that is said to have arrived is the block that was put, and nothing else is written
    to the device's other blocks."""

    name = "store_objects"
    prefix = "xllm/root/"

    def __init__(self) -> None:
        self._blocks = np.zeros((4, _BLOCK_BYTES), dtype=np.uint8)
        self.device = HostMemoryBlocks(self._blocks)
        self._memory = np.zeros((3, slot_stride(_BLOCK_BYTES)), dtype=np.uint8)

    def slot(self, index: int) -> Buffer:
        slot: Buffer = self._memory[index]
        return slot

    def make(self, rng: random.Random) -> _Answer:
        objects = []
        for data in _OBJECTS:
            kind = rng.random()
            if kind < 0.3:
                objects.append(data)
            elif kind < 0.4:
                objects.append(rng.choice(_OBJECTS))
            elif kind < 0.5:
                objects.append(random_bytes(rng))
            else:
                objects.append(mutate_bytes(rng, data))
        codes = [
            len(data) if rng.random() < 0.9 else rng.choice([_SIZE, -704, -900, -1, 0, 1 << 40])
            for data in objects
        ]
        return _Answer(codes, objects)

    def feed(self, data: _Answer) -> None:
        self._blocks[:] = 0
        job = Get(_NAMES, [0, 1, 2])

        def call(request: Request) -> list[int]:
            for slot, value in zip(self._memory, data.objects, strict=True):
                some = np.frombuffer(value[: slot.nbytes], dtype=np.uint8)
                slot[: some.nbytes] = some
            return data.codes

        try:
            job.run(self, call, range(3))
        except StoreUnavailable:
            assert -900 in data.codes
            return
        for i, outcome in enumerate(job.outcomes):
            if outcome is StoreOutcome.DONE:
                assert (self._blocks[i] == _PAYLOADS[i]).all()
        assert not self._blocks[3].any()

    def allowed_bytes(self, data: _Answer) -> int:
        return 64 * 1024
