"""What processes write into etcd beside the index: registrations, reports, commands."""

from __future__ import annotations

import contextlib
import itertools
import random

import msgspec
import orjson

from tests.fuzz.mutate import mutate_bytes, mutate_value, odd_value, random_bytes
from tests.fuzz.runner import Target
from xllm.cache.index import CacheIndex
from xllm.coordination import DELETE, PUT, Change, Keys, KeyValue, Snapshot
from xllm.errors import RequestError
from xllm.net import split_host_port
from xllm.protocol import (
    Command,
    CommandKind,
    Epoch,
    FetchRange,
    GenerateRequest,
    LeaderWord,
    MasterId,
    MasterInfo,
    ModelCard,
    PrefillCost,
    SamplingParams,
    Watermark,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)
from xllm.roles import frames
from xllm.roles.car_policy import POLICY_NAMES, make_router
from xllm.roles.commands import decode_command, is_stale
from xllm.roles.cost_routing import Targets
from xllm.roles.leader_word import decode_word
from xllm.roles.registration import cache_root, decode_master
from xllm.roles.registry import Registry
from xllm.roles.stream_client import StreamState
from xllm.security.seal import Seal
from xllm.security.secret import ClusterSecret

_CARD = ModelCard(model_id="m", max_model_len=4096, vocab_size=300, created=0)
_KEYS = Keys("t")
_INFO = WorkerInfo(
    worker_id=WorkerId("a:1"),
    epoch=Epoch(7),
    address="127.0.0.1:1",
    operator_address="127.0.0.1:2",
    block_address="127.0.0.1:3",
    model=_CARD,
    fingerprint="f",
    block_size=32,
    kv_dtype="float32",
    device_blocks=1,
    block_bytes=1,
)
_LOAD = WorkerLoad(
    epoch=Epoch(7),
    prefill_cost=PrefillCost(0.1, 0.01, 0.001),
    tier_block_s={"host": 0.1},
    watermarks={"m": Watermark(1, 2, 3)},
)
RegistryInput = list[tuple[str, Snapshot | list[Change]]]


class _Stream:
    """A worker that is always up."""

    state = StreamState.UP
    draining = False

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info

    def expect(self, info: WorkerInfo) -> None:
        self.info = info

    def unreported(self, load: WorkerLoad | None) -> int:
        return 0

    def unacknowledged(self, load: WorkerLoad) -> int:
        return 0


class RegistryTarget(Target):
    """Registrations and load reports as a master reads them from etcd."""

    name = "registry"

    def make(self, rng: random.Random) -> RegistryInput:
        updates: RegistryInput = []
        for _ in range(rng.randint(1, 3)):
            is_load = rng.random() < 0.4
            kvs = [self._some_kv(rng, is_load) for _ in range(rng.randint(1, 2))]
            update: Snapshot | list[Change]
            if rng.random() < 0.3:
                update = Snapshot(3, tuple(kvs))
            else:
                update = [Change(DELETE if rng.random() < 0.1 else PUT, kv) for kv in kvs]
            updates.append(("load" if is_load else "workers", update))
        return updates

    def _some_kv(self, rng: random.Random, is_load: bool) -> KeyValue:
        worker_id = WorkerId(rng.choice(("a:1", "b:1")))
        key = _KEYS.load_of(worker_id) if is_load else _KEYS.worker(worker_id)
        value = msgspec.json.encode(
            _LOAD if is_load else msgspec.structs.replace(_INFO, worker_id=worker_id)
        )
        with contextlib.suppress(TypeError, orjson.JSONEncodeError):
            if rng.random() < 0.7:
                value = orjson.dumps(mutate_value(rng, orjson.loads(value), odd_value))
        if rng.random() < 0.2:
            value = mutate_bytes(rng, value)
        return KeyValue(key, value, rng.randrange(9), 9, 7)

    def feed(self, data: RegistryInput) -> None:
        registry = Registry(_Stream)
        index, clock = CacheIndex(), itertools.count().__next__
        name = POLICY_NAMES[self.allowed_bytes(data) % len(POLICY_NAMES)]
        router = make_router(name, index, registry.cache_root, clock, Targets(1.0, 0.1))

        def report(info: WorkerInfo, load: WorkerLoad, num_unacknowledged: int) -> None:
            router.report(cache_root(info), info.worker_id, load, num_unacknowledged)

        registry.on_report(report)
        for kind, update in data:
            (registry.apply_loads if kind == "load" else registry.apply_workers)(update)
            registry.count_states()
            for card in registry.model_cards():
                request = GenerateRequest(
                    request_id="r",
                    model_id=card.model_id,
                    prompt_ids=[1] * 100,
                    sampling=SamplingParams(),
                )
                candidates = registry.candidates(card.model_id)
                with contextlib.suppress(RequestError):
                    router.dispatched(router.route(request, candidates))
            for stream in registry.streams():
                # What a stream does with it: connects, and says hello.
                split_host_port(stream.info.address)
                hello = frames.Hello(1, MasterId("m"), stream.info.worker_id, stream.info.epoch, 0)
                frames.append_frame(bytearray(), hello, frames.MAX_TO_WORKER_BYTES)

    def allowed_bytes(self, data: RegistryInput) -> int:
        num_bytes = 0
        for _, update in data:
            kvs = [c.kv for c in update] if isinstance(update, list) else update.kvs
            num_bytes += sum(len(kv.value) for kv in kvs)
        return (256 << 10) + 101 * num_bytes


_WORDS = (
    MasterInfo(master_id=MasterId("m"), http_address="127.0.0.1:1", operator_address="127.0.0.1:2"),
    LeaderWord(master_id=MasterId("m"), wanting=[WorkerId("a:1")]),
    Command(
        command_id="c",
        worker_id=WorkerId("a:1"),
        epoch=Epoch(7),
        kind=CommandKind.MOVE,
        master_id=MasterId("m"),
        created_at=1.0,
        blocks=b"b" * 32,
        fetch=[FetchRange(WorkerId("b:1"), "127.0.0.1:3", 0, 2)],
    ),
)


class WordTarget(Target):
    """What masters say to workers and to each other."""

    name = "words"

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.05:
            return random_bytes(rng)
        value = msgspec.json.encode(rng.choice(_WORDS))
        with contextlib.suppress(TypeError, orjson.JSONEncodeError):
            if rng.random() < 0.7:
                value = orjson.dumps(mutate_value(rng, orjson.loads(value)))
        return mutate_bytes(rng, value) if rng.random() < 0.3 else value

    def feed(self, data: bytes) -> None:
        decode_master(KeyValue(_KEYS.masters + "m", data, 1, 1, 1))
        decode_word(data)
        decode_command(data)
        is_stale(data, absent_s=1.0, now=1000.0)

    def allowed_bytes(self, data: bytes) -> int:
        return (64 << 10) + 100 * len(data)


SealInput = tuple[str, bytes, int]
"""Key, value, lease."""


class SealTarget(Target):
    """Records with a proof: what is not as it was closed is read as nothing."""

    name = "seals"

    def __init__(self) -> None:
        seal = Seal(ClusterSecret("s" * 32), clock_ns=lambda: 1)
        key = _KEYS.worker(WorkerId("a:1"))
        self._record = msgspec.json.encode(_INFO)
        self._closed: SealInput = (key, seal.close(key, self._record, 7), 7)

    def make(self, rng: random.Random) -> SealInput:
        key, value, lease_id = self._closed
        match rng.randrange(8):
            case 0:
                key = _KEYS.worker(WorkerId("b:1"))
            case 1:
                lease_id = 8
            case 2:
                value = random_bytes(rng)
            case 3:
                pass
            case _:
                value = mutate_bytes(rng, value)
        return key, value, lease_id

    def feed(self, data: SealInput) -> None:
        key, value, lease_id = data
        opened = Seal(ClusterSecret("s" * 32)).open(key, value, lease_id, revision=5)
        assert opened == (self._record if data == self._closed else b"")

    def allowed_bytes(self, data: SealInput) -> int:
        return (64 << 10) + 20 * len(data[1])
