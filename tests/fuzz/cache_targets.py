"""What is read back from etcd and from disk."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import numpy as np

from tests.fuzz.mutate import mutate_bytes, odd_text, random_bytes
from tests.fuzz.runner import Target
from xllm.cache import event_codec as codec
from xllm.cache import slab_format as slab
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import BadValue, EventBatch, Head, Section, TierCode
from xllm.cache.index import CacheIndex
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue, Snapshot
from xllm.protocol import BlockHash, Epoch, WorkerId
from xllm.roles.index_view import IndexView, WorkerSnapshot

_OVERHEAD_BYTES = 128 << 10
_BYTES_PER_BYTE = 100
"""A section of one block takes 13 bytes, and becomes a Section, a tuple and an int."""

_KINDS = (BlockEventKind.STORED, BlockEventKind.STORED, BlockEventKind.REMOVED)


def _some_batch(rng: random.Random, *, only_stored: bool = False) -> EventBatch:
    sections = []
    for _ in range(rng.randint(0, 3)):
        kind = BlockEventKind.STORED if only_stored else rng.choice((*_KINDS, _CLEARED))
        hashes = () if kind is _CLEARED else tuple(range(rng.randrange(9), 10))
        sections.append(Section(rng.choice(list(TierCode)), kind, hashes))
    return EventBatch(tuple(sections))


_CLEARED = BlockEventKind.CLEARED


def _some_head(rng: random.Random) -> Head:
    chunks = rng.choice((0, 1, 1, 2, 2**32 - 1))
    return Head(rng.choice((1, 2, 2**64 - 1)), chunks, rng.choice((0, 1, 2, 2**64 - 1)))


def _some_value(rng: random.Random) -> bytes:
    match rng.randrange(4):
        case 0:
            value = codec.encode_head(_some_head(rng))
        case 1:
            value = codec.encode_chunk(_some_batch(rng, only_stored=True))
        case _:
            value = codec.encode_delta(_some_batch(rng))
    if rng.random() < 0.4:
        value = mutate_bytes(rng, value)
    return value


class EventTarget(Target):
    """The codec: a value is refused, or is the one encoding of what it says."""

    name = "events"

    def make(self, rng: random.Random) -> bytes:
        return random_bytes(rng) if rng.random() < 0.1 else _some_value(rng)

    def feed(self, data: bytes) -> None:
        with contextlib.suppress(BadValue):
            assert codec.encode_delta(codec.decode_delta(data)) == data
        with contextlib.suppress(BadValue):
            assert codec.encode_chunk(codec.decode_chunk(data)) == data
        with contextlib.suppress(BadValue):
            assert codec.encode_head(codec.decode_head(data)) == data

    def allowed_bytes(self, data: bytes) -> int:
        return _OVERHEAD_BYTES + _BYTES_PER_BYTE * len(data)


_KEYS = Keys("t")
_WORKERS = (WorkerId("a:1"), WorkerId("b"))
_EPOCHS = (Epoch(7), Epoch(8))
IndexInput = list[Snapshot | list[Change] | WorkerSnapshot]


class IndexTarget(Target):
    """A master's view of the index, fed with news that no worker would write."""

    name = "index"

    def make(self, rng: random.Random) -> IndexInput:
        return [self._some_update(rng) for _ in range(rng.randint(1, 3))]

    def _some_update(self, rng: random.Random) -> Snapshot | list[Change] | WorkerSnapshot:
        kvs = [self._some_kv(rng) for _ in range(rng.randint(1, 6))]
        match rng.randrange(8):
            case 0:
                return Snapshot(9, tuple(kvs))
            case 1:
                return WorkerSnapshot(rng.choice(_WORKERS), rng.choice(_EPOCHS), kvs)
        registration = self._registration(rng)
        kinds = [PUT, *(DELETE if rng.random() < 0.1 else PUT for _ in kvs)]
        return [Change(kind, kv) for kind, kv in zip(kinds, [registration, *kvs], strict=True)]

    def _registration(self, rng: random.Random) -> KeyValue:
        return KeyValue(_KEYS.worker(rng.choice(_WORKERS)), b"{}", 1, 1, rng.choice(_EPOCHS))

    def _some_kv(self, rng: random.Random) -> KeyValue:
        if rng.random() < 0.1:
            return self._registration(rng)
        folder = _KEYS.cache_of(rng.choice(_WORKERS), rng.choice(_EPOCHS))
        number = rng.choice((0, 1, 1, 2, 3, 2**64 - 1))
        name = rng.choice((f"d/{number:016x}", "head", f"s/{number:016x}/{rng.randrange(2):08x}"))
        key = folder + name
        if rng.random() < 0.1:
            key = _KEYS.cache + odd_text(rng) + rng.choice(("", "/", f"/{number:x}/d/1", "/7/d/x"))
        elif rng.random() < 0.1:
            key = mutate_bytes(rng, key.encode()).decode(errors="replace")
        return KeyValue(key, _some_value(rng), 1, 2, rng.choice(_EPOCHS))

    def feed(self, data: IndexInput) -> None:
        index = CacheIndex()
        view = IndexView(_KEYS, index)
        for update in data:
            view.feed(update)
        view.work()
        assert view.is_idle
        view.missing()
        index.check_invariants()

    def allowed_bytes(self, data: IndexInput) -> int:
        num_bytes = 0
        for update in data:
            kvs = [c.kv for c in update] if isinstance(update, list) else update.kvs
            num_bytes += sum(len(kv.key) + len(kv.value) for kv in kvs)
        return (1 << 20) + _BYTES_PER_BYTE * num_bytes


_GEOMETRY = slab.SlabGeometry(num_slots=8, payload_bytes=1000)
_ROOT = BlockHash(b"r" * 16)
SlabInput = tuple[bytes, bytes]


class SlabTarget(Target):
    """Superblock and headers; half of the headers that are wrong have a checksum that is right."""

    name = "slab"

    def make(self, rng: random.Random) -> SlabInput:
        superblock = slab.encode_superblock(_GEOMETRY, _ROOT, rng.choice((0, 1, 5, 2**64 - 1)))
        if rng.random() < 0.5:
            superblock = mutate_bytes(rng, superblock)
        headers = [self._some_header(rng, slot) for slot in range(_GEOMETRY.num_slots)]
        if rng.random() < 0.1:
            headers[rng.randrange(len(headers))] = rng.randbytes(slab.HEADER_BYTES)
        return superblock, b"".join(headers)

    def _some_header(self, rng: random.Random, slot: int) -> bytes:
        if rng.random() < 0.3:
            return bytes(slab.HEADER_BYTES)
        name = BlockHash(rng.choice((b"a", b"b", b"c")) * 16)
        sequence = rng.choice((0, 1, slot, slot, 2**63, 2**64 - 1))
        record = slab.SlotRecord(slot, sequence, name, rng.choice((None, name)), b"c" * 16)
        header = slab.encode_header(record, _GEOMETRY.payload_bytes)
        if rng.random() < 0.3:
            header = mutate_bytes(rng, header)[: slab.HEADER_BYTES].ljust(slab.HEADER_BYTES, b"\0")
        return header

    def feed(self, data: SlabInput) -> None:
        superblock, region = data
        first = slab.decode_superblock(superblock, _GEOMETRY, _ROOT)
        if first is None:
            first = 1
        else:
            assert slab.encode_superblock(_GEOMETRY, _ROOT, first) == superblock
        raw = np.frombuffer(region, dtype=np.uint8)
        records = slab.decode_headers(raw, _GEOMETRY.payload_bytes, first)
        assert [r.sequence for r in records] == sorted(r.sequence for r in records)
        for record in records:
            start = record.slot * slab.HEADER_BYTES
            found = region[start : start + slab.HEADER_BYTES]
            assert slab.encode_header(record, _GEOMETRY.payload_bytes) == found
            assert record.sequence >= first
        if records:
            # What the disk tier writes next has to be sayable, and newer than all of them.
            following = replace(records[-1], sequence=records[-1].sequence + 1)
            slab.encode_header(following, _GEOMETRY.payload_bytes)

    def allowed_bytes(self, data: SlabInput) -> int:
        return _OVERHEAD_BYTES
