"""The registry: what etcd and the streams say, in any order, and who may get requests then."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm.coordination import DELETE, PUT, Change, KeyValue, Snapshot
from xllm.errors import NoWorker, UnknownModel
from xllm.protocol import (
    PROTOCOL_VERSION,
    Epoch,
    ModelCard,
    PrefillCost,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)
from xllm.roles.registration import find_conflict
from xllm.roles.registry import MemberState, Registry
from xllm.roles.stream_client import StreamState


class FakeStream:
    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.state = StreamState.CONNECTING
        self.draining = False

    def unreported(self, load: WorkerLoad | None) -> int:
        return 5 if load is None else -load.running_requests_num

    def unacknowledged(self, load: WorkerLoad) -> int:
        return load.waiting_requests_num

    def expect(self, info: WorkerInfo) -> None:
        self.info = info


def make_info(worker_id: str, model_id: str = "m", **fields: object) -> WorkerInfo:
    info = WorkerInfo(
        worker_id=WorkerId(worker_id),
        epoch=Epoch(1),
        address="127.0.0.1:1",
        operator_address="127.0.0.1:2",
        model=ModelCard(model_id=model_id, max_model_len=100, vocab_size=10, created=0),
        fingerprint="f" * 32,
        block_size=32,
        kv_dtype="float32",
        device_blocks=1,
        block_bytes=1,
    )
    return msgspec.structs.replace(info, **fields)


def kv_of(info: WorkerInfo, revision: int) -> KeyValue:
    value = msgspec.json.encode(info)
    return KeyValue(f"/xllm/t/workers/{info.worker_id}", value, revision, revision, info.epoch)


def put(info: WorkerInfo, revision: int = 1) -> Change:
    return Change(PUT, kv_of(info, revision))


def delete(worker_id: str) -> Change:
    return Change(DELETE, KeyValue(f"/xllm/t/workers/{worker_id}", b"", 0, 9, 0))


def load_kv(worker_id: str, load: WorkerLoad) -> KeyValue:
    return KeyValue(f"/xllm/t/load/{worker_id}", msgspec.json.encode(load), 1, 1, load.epoch)


@pytest.fixture
def registry() -> Registry[FakeStream]:
    return Registry(FakeStream)


def connect(registry: Registry[FakeStream], *worker_ids: str) -> None:
    for worker_id in worker_ids:
        registry.stream(WorkerId(worker_id)).state = StreamState.UP
    registry.settle()


def states(registry: Registry[FakeStream]) -> dict[str, str]:
    return {member.info.worker_id: member.state.value for member in registry}


def usable(registry: Registry[FakeStream], model_id: str = "m") -> list[str]:
    return [member.info.worker_id for member in registry.usable(model_id)]


def test_a_worker_is_ready_when_it_is_registered_and_its_stream_is_up(
    registry: Registry[FakeStream],
) -> None:
    registry.apply_workers(Snapshot(1, []))
    with pytest.raises(NoWorker):
        registry.usable("m")
    registry.apply_workers([put(make_info("b")), put(make_info("a"))])
    assert states(registry) == {"a": "connecting", "b": "connecting"}
    assert registry.model_cards() == []
    with pytest.raises(NoWorker):
        registry.usable("m")
    connect(registry, "a", "b")
    assert usable(registry) == ["a", "b"]
    assert [card.model_id for card in registry.model_cards()] == ["m"]
    with pytest.raises(UnknownModel, match="'typo'"):
        registry.usable("typo")


def test_a_lease_that_is_gone_makes_suspect_while_the_stream_is_up(
    registry: Registry[FakeStream],
) -> None:
    registry.apply_workers(Snapshot(1, [kv_of(make_info("a"), 1), kv_of(make_info("b"), 2)]))
    connect(registry, "a", "b")
    registry.apply_workers([delete("a")])
    assert states(registry) == {"a": "suspect", "b": "ready"}
    assert usable(registry) == ["b"]
    registry.stream(WorkerId("b")).state = StreamState.SUSPECT
    assert usable(registry) == ["a", "b"], "none is ready"
    registry.stream(WorkerId("a")).state = StreamState.CONNECTING
    registry.settle()
    assert states(registry) == {"b": "suspect"}


def test_an_etcd_that_came_back_empty_takes_nobody_away(registry: Registry[FakeStream]) -> None:
    registry.apply_workers(Snapshot(7, [kv_of(make_info("a"), 5)]))
    connect(registry, "a")
    stream = registry.stream(WorkerId("a"))
    registry.apply_workers(Snapshot(1, []))
    assert usable(registry) == ["a"]
    registry.apply_workers([put(make_info("a", epoch=Epoch(2)))])
    assert states(registry) == {"a": "ready"}
    assert registry.stream(WorkerId("a")) is stream
    assert stream.info.epoch == 2


def test_a_worker_whose_lease_is_gone_is_not_waited_for(registry: Registry[FakeStream]) -> None:
    registry.apply_workers([put(make_info("a"))])
    registry.apply_workers([delete("a")])
    assert states(registry) == {}
    assert registry.streams() == set()
    with pytest.raises(NoWorker):
        registry.usable("m")


@pytest.mark.parametrize("said_by", ["stream", "etcd"])
def test_a_draining_worker_gets_nothing_new(registry: Registry[FakeStream], said_by: str) -> None:
    registry.apply_workers([put(make_info("a"))])
    connect(registry, "a")
    if said_by == "stream":
        registry.stream(WorkerId("a")).draining = True
    else:
        registry.apply_workers([put(make_info("a", state=WorkerState.DRAINING))])
    assert states(registry) == {"a": "draining"}
    with pytest.raises(NoWorker):
        registry.usable("m")
    registry.apply_workers([delete("a")])
    assert len(registry.streams()) == 1, "its requests are still running"


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"fingerprint": "0" * 32}, "other weights"), ({"block_size": 16}, "--block_size=32, not 16")],
)
def test_whoever_differs_from_the_first_worker_of_its_model_is_refused(
    registry: Registry[FakeStream], change: dict[str, object], reason: str
) -> None:
    # In order of registration, not of arrival or name.
    late = make_info("a", **change)
    registry.apply_workers(Snapshot(9, [kv_of(late, 5), kv_of(make_info("b"), 3)]))
    registry.apply_workers([put(make_info("c"), 6)])
    assert states(registry) == {"a": "refused", "b": "connecting", "c": "connecting"}
    (refused,) = (member for member in registry if member.state is MemberState.REFUSED)
    assert reason in refused.refusal
    # The first one leaves, but its like is still here.
    registry.apply_workers([delete("b")])
    assert states(registry) == {"a": "refused", "c": "connecting"}
    registry.apply_workers([delete("c")])
    assert states(registry) == {"a": "connecting"}


def test_models_do_not_share_workers(registry: Registry[FakeStream]) -> None:
    other = make_info("b", "n", fingerprint="0" * 32)
    registry.apply_workers([put(make_info("a")), put(other)])
    connect(registry, "a", "b")
    assert (usable(registry), usable(registry, "n")) == (["a"], ["b"])
    assert [card.model_id for card in registry.model_cards()] == ["m", "n"]


def test_the_length_that_is_promised_holds_on_every_worker(
    registry: Registry[FakeStream],
) -> None:
    short = ModelCard(model_id="m", max_model_len=50, vocab_size=10, created=0)
    registry.apply_workers([put(make_info("a")), put(make_info("b", model=short))])
    connect(registry, "a", "b")
    assert [card.max_model_len for card in registry.model_cards()] == [50]


def test_a_worker_that_comes_back_with_another_model_gets_a_new_stream(
    registry: Registry[FakeStream],
) -> None:
    registry.apply_workers([put(make_info("a"))])
    connect(registry, "a")
    before = registry.streams()
    registry.apply_workers([put(make_info("a", "n", epoch=Epoch(2)))])
    assert not before & registry.streams()
    assert states(registry) == {"a": "connecting"}


def test_candidates_carry_the_last_load(registry: Registry[FakeStream]) -> None:
    first, second = (
        load_kv("a", WorkerLoad(epoch=Epoch(1), running_requests_num=n)) for n in (1, 2)
    )
    registry.apply_loads(Snapshot(1, [first]))
    registry.apply_workers([put(make_info("a")), put(make_info("b"))])
    connect(registry, "a", "b")
    registry.apply_loads([Change(PUT, second)])
    a, b = registry.candidates("m")
    assert a.load is not None
    assert (a.load.running_requests_num, a.unreported) == (2, -2)
    assert (b.load, b.unreported) == (None, 5)
    registry.apply_loads(Snapshot(1, []))
    assert registry.candidates("m")[0].load is None


@pytest.mark.parametrize("garbage", [b"{", b"[]", b"\xff", b'"\xff"', b"[" * 100_000])
def test_values_that_are_none_are_passed_over(
    registry: Registry[FakeStream], garbage: bytes
) -> None:
    bad = KeyValue("/xllm/t/workers/x", garbage, 1, 1, 1)
    registry.apply_workers(Snapshot(1, [bad, kv_of(make_info("a"), 1)]))
    registry.apply_loads([Change(PUT, KeyValue("/xllm/t/load/a", garbage, 1, 1, 1))])
    assert states(registry) == {"a": "connecting"}


@pytest.mark.parametrize(
    "change",
    [
        {"address": "nowhere"},
        {"address": "127.0.0.1:x"},
        {"address": ""},
        {"epoch": Epoch(2**64)},
        {"epoch": Epoch(-(10**30))},
        {"block_size": 0},
        {"block_bytes": -1},
        {"device_blocks": 0},
        {"model": ModelCard(model_id="m", max_model_len=0, vocab_size=10, created=0)},
    ],
)
def test_a_registration_that_cannot_be_is_passed_over(
    registry: Registry[FakeStream], change: dict[str, object]
) -> None:
    registry.apply_workers([put(make_info("a", **change)), put(make_info("b"))])
    assert states(registry) == {"b": "connecting"}


def test_a_registration_under_another_name_is_passed_over(registry: Registry[FakeStream]) -> None:
    value = msgspec.json.encode(make_info("b"))
    registry.apply_workers([Change(PUT, KeyValue("/xllm/t/workers/a", value, 1, 1, 1))])
    assert states(registry) == {}


@pytest.mark.parametrize(
    "load",
    [
        WorkerLoad(epoch=Epoch(1), prefill_cost=PrefillCost(0.0, 0.0, 1e308)),
        WorkerLoad(epoch=Epoch(1), tier_block_s={"host": -1e300}),
        WorkerLoad(epoch=Epoch(1), queue_s=1e30),
        WorkerLoad(epoch=Epoch(1), prefill_tokens_per_s=1e-320),
    ],
)
def test_a_load_that_nobody_has_measured_is_passed_over(
    registry: Registry[FakeStream], load: WorkerLoad
) -> None:
    registry.apply_workers([put(make_info("a"))])
    connect(registry, "a")
    registry.apply_loads([Change(PUT, load_kv("a", load))])
    assert registry.candidates("m")[0].load is None


def test_what_a_later_version_adds_is_passed_over(registry: Registry[FakeStream]) -> None:
    fields = msgspec.json.decode(msgspec.json.encode(make_info("a")))
    fields |= {"of_tomorrow": {"a": [1]}}
    fields["model"] |= {"of_tomorrow": 1}
    value = msgspec.json.encode(fields)
    registry.apply_workers([Change(PUT, KeyValue("/xllm/t/workers/a", value, 1, 1, 1))])
    connect(registry, "a")
    assert usable(registry) == ["a"]
    load = msgspec.json.encode({"epoch": 1, "running_requests_num": 2, "of_tomorrow": 3})
    registry.apply_loads([Change(PUT, KeyValue("/xllm/t/load/a", load, 1, 1, 1))])
    (candidate,) = registry.candidates("m")
    assert candidate.load is not None
    assert candidate.load.running_requests_num == 2


def test_another_protocol_version_is_refused_and_sets_nothing(
    registry: Registry[FakeStream],
) -> None:
    newer = make_info("a", protocol_version=PROTOCOL_VERSION + 1, fingerprint="0" * 32)
    registry.apply_workers([put(newer, 1), put(make_info("b"), 2)])
    connect(registry, "b")
    assert states(registry) == {"a": "refused", "b": "ready"}
    (refused,) = (member for member in registry if member.state is MemberState.REFUSED)
    assert f"{PROTOCOL_VERSION + 1} of the worker" in refused.refusal
    assert f"{PROTOCOL_VERSION} of this master" in refused.refusal
    # Upgraded, or taken back, it serves.
    registry.apply_workers([put(make_info("a"), 3)])
    assert states(registry) == {"a": "connecting", "b": "ready"}


def test_states_are_counted(registry: Registry[FakeStream]) -> None:
    registry.apply_workers([put(make_info("a")), put(make_info("b"))])
    connect(registry, "a")
    counts = registry.count_states()
    assert {state.value: n for state, n in counts.items() if n} == {"ready": 1, "connecting": 1}


def test_a_worker_finds_out_itself_that_it_may_not_join() -> None:
    first, mine = make_info("a"), make_info("b", block_size=16)
    assert find_conflict(mine, []) == ""
    assert "--block_size=32" in find_conflict(mine, [kv_of(first, 1)])
    assert find_conflict(make_info("c"), [kv_of(first, 1)]) == ""
    assert find_conflict(make_info("b", "n", block_size=16), [kv_of(first, 1)]) == ""
    # Both have registered at the same time: the older key stays.
    both = [kv_of(first, 5), kv_of(mine, 4)]
    assert find_conflict(mine, both) == ""
    assert "worker b" in find_conflict(first, both)


class RegistryMachine(RuleBasedStateMachine):
    """Any order of events: who may get requests agrees with what was said last."""

    def __init__(self) -> None:
        super().__init__()
        self.registry: Registry[FakeStream] = Registry(FakeStream)
        self.leased: dict[str, WorkerInfo] = {}
        self.revision = 0

    names = st.sampled_from(["a", "b", "c"])
    sizes = st.sampled_from([16, 32])

    @rule(name=names, block_size=sizes)
    def register(self, name: str, block_size: int) -> None:
        self.revision += 1
        self.leased[name] = make_info(name, block_size=block_size, epoch=Epoch(self.revision))
        self.registry.apply_workers([put(self.leased[name], self.revision)])

    @rule(name=names)
    def expire(self, name: str) -> None:
        if self.leased.pop(name, None) is not None:
            self.registry.apply_workers([delete(name)])

    @rule()
    def resync(self) -> None:
        self.revision += 1
        kvs = [kv_of(info, self.revision) for info in self.leased.values()]
        self.registry.apply_workers(Snapshot(self.revision, kvs))

    @rule()
    def lose_everything(self) -> None:
        self.leased.clear()
        self.registry.apply_workers(Snapshot(1, []))

    @rule(name=names, state=st.sampled_from(StreamState))
    def stream_changes(self, name: str, state: StreamState) -> None:
        for member in self.registry:
            if member.info.worker_id == name and member.stream is not None:
                member.stream.state = state
        self.registry.settle()

    @invariant()
    def leased_workers_are_known(self) -> None:
        known = {member.info.worker_id: member for member in self.registry}
        assert set(self.leased) <= set(known)
        for name, member in known.items():
            if name in self.leased:
                assert member.info == self.leased[name]
            else:
                assert member.state is MemberState.SUSPECT

    @invariant()
    def workers_with_a_stream_agree(self) -> None:
        sizes = {m.info.block_size for m in self.registry if m.stream is not None}
        assert len(sizes) <= 1
        assert len(sizes) == 1 or not list(self.registry)

    @invariant()
    def whoever_is_usable_is_connected(self) -> None:
        connected = any(
            m.stream is not None and m.stream.state is not StreamState.CONNECTING
            for m in self.registry
        )
        assert bool(self.registry.model_cards()) == connected
        if connected:
            assert all(c.worker_id for c in self.registry.candidates("m"))


RegistryMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
test_registry_machine = RegistryMachine.TestCase
