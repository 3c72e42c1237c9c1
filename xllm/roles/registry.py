"""Who is alive: what etcd says of workers and their load, and what their streams say.

Only etcd adds a worker; etcd and its stream together remove it:

                    stream down      stream up       stream up, silent    worker drains
    lease alive     CONNECTING       READY           SUSPECT              DRAINING
    lease gone      removed          SUSPECT         SUSPECT              DRAINING

A lease may be gone while its worker runs on (a pause, an etcd that came back empty), so a worker
whose stream answers stays. READY workers get requests; SUSPECT ones only while no other is READY.

Of the workers of one model the first sets weights, dtype and block size for as long as any that
agrees with it is here; one that does not agree is REFUSED, and has no stream. So is one that speaks
another version of the protocol: a master of that version serves it.

Everything here is synchronous. Whoever feeds the registry runs the streams that `streams()` names,
and ends those that it does not name any more.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Generic, Protocol, TypeVar

from xllm.cache.block_hash import CacheRoot
from xllm.coordination import PUT, Change, KeyValue, Snapshot
from xllm.errors import NoWorker, UnknownModel
from xllm.protocol import ModelCard, WorkerId, WorkerInfo, WorkerLoad, WorkerState
from xllm.roles.global_scheduler import Candidate
from xllm.roles.registration import (
    CacheGroup,
    cache_root,
    decode_load,
    decode_worker,
    version_refusal,
)
from xllm.roles.stream_client import StreamState

logger = logging.getLogger(__name__)


class StreamView(Protocol):
    """What the registry needs of a `WorkerStream`."""

    @property
    def state(self) -> StreamState: ...
    @property
    def draining(self) -> bool: ...
    def unreported(self, load: WorkerLoad | None) -> int: ...
    def unacknowledged(self, load: WorkerLoad) -> int: ...
    def expect(self, info: WorkerInfo) -> None: ...


StreamT = TypeVar("StreamT", bound=StreamView)


class MemberState(enum.StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    REFUSED = "refused"


class Member(Generic[StreamT]):
    """One worker. `stream` is None while it is refused."""

    __slots__ = ("info", "refusal", "registered", "since", "stream")

    def __init__(self, info: WorkerInfo, since: int) -> None:
        self.info = info
        self.since = since
        """create_revision of its key: who was first."""
        self.registered = True
        self.refusal = ""
        self.stream: StreamT | None = None

    @property
    def model_id(self) -> str:
        return self.info.model.model_id

    @property
    def state(self) -> MemberState:
        if self.stream is None:
            return MemberState.REFUSED
        if self.stream.state is StreamState.CONNECTING:
            return MemberState.CONNECTING
        if self.stream.draining or self.info.state is WorkerState.DRAINING:
            return MemberState.DRAINING
        if not self.registered or self.stream.state is StreamState.SUSPECT:
            return MemberState.SUSPECT
        return MemberState.READY


class Registry(Generic[StreamT]):
    """All workers that this master knows. `make_stream` must not do I/O."""

    def __init__(self, make_stream: Callable[[WorkerInfo], StreamT]) -> None:
        self._make_stream = make_stream
        self._members: dict[WorkerId, Member[StreamT]] = {}
        self._loads: dict[WorkerId, WorkerLoad] = {}
        self._groups: dict[str, CacheGroup] = {}
        """By model_id, of every model that was ever here: that it is away is not a typo."""
        self._by_model: dict[str, list[Member[StreamT]]] = {}
        """In the order of their ids; empty when etcd or a stream has said something."""
        self._block_addresses: dict[str, Mapping[WorkerId, str]] = {}
        """By model_id, likewise."""
        self._on_report: Callable[[WorkerInfo, WorkerLoad, int], None] = lambda *_: None
        self._on_gone: list[Callable[[WorkerId], None]] = []

    def on_report(self, listen: Callable[[WorkerInfo, WorkerLoad, int], None]) -> None:
        """`listen` gets each load report, and how many requests were sent after it."""
        self._on_report = listen

    def on_gone(self, listen: Callable[[WorkerId], None]) -> None:
        """`listen` is told of each worker that is not known any more."""
        self._on_gone.append(listen)

    # What etcd and the streams say

    def apply_workers(self, update: Snapshot | list[Change]) -> None:
        """A batch of the watch on `workers/`."""
        if isinstance(update, Snapshot):
            present = {_worker_id(kv) for kv in update.kvs}
            for worker_id, member in self._members.items():
                member.registered = worker_id in present
            for kv in update.kvs:
                self._put(kv)
        else:
            for change in update:
                if change.kind is PUT:
                    self._put(change.kv)
                elif (gone := self._members.get(_worker_id(change.kv))) is not None:
                    gone.registered = False
        self.settle()

    def apply_loads(self, update: Snapshot | list[Change]) -> None:
        """A batch of the watch on `load/`."""
        if isinstance(update, Snapshot):
            self._loads.clear()
            update = [Change(PUT, kv) for kv in update.kvs]
        for change in update:
            worker_id = _worker_id(change.kv)
            self._loads.pop(worker_id, None)
            if change.kind is PUT and change.kv.value:
                if (load := decode_load(change.kv)) is not None:
                    self._loads[worker_id] = load
                self._report(self._members.get(worker_id))

    def settle(self) -> None:
        """Drops who is gone and groups the others; to be called when a stream has changed."""
        self._by_model.clear()
        self._block_addresses.clear()
        for worker_id, member in list(self._members.items()):
            gone = (MemberState.CONNECTING, MemberState.REFUSED)
            if not member.registered and member.state in gone:
                del self._members[worker_id]
                logger.info("worker_removed worker_id=%s", worker_id)
                for listen in self._on_gone:
                    listen(worker_id)
        compatible = [m for m in self if not version_refusal(m.info)]
        served = {(member.model_id, cache_root(member.info)) for member in compatible}
        for member in self:
            if refusal := version_refusal(member.info):
                self._admit(member, refusal)
        for member in sorted(compatible, key=lambda member: member.since):
            group = self._groups.get(member.model_id)
            if group is None or (member.model_id, group.root) not in served:
                group = self._groups[member.model_id] = CacheGroup.of(member.info)
            self._admit(member, group.refusal(member.info))

    def _put(self, kv: KeyValue) -> None:
        info = decode_worker(kv)
        if info is None:
            return
        member = self._members.get(info.worker_id)
        if member is None:
            self._members[info.worker_id] = Member(info, kv.create_revision)
            logger.info(
                "worker_added worker_id=%s model_id=%s address=%s",
                *(info.worker_id, info.model.model_id, info.address),
            )
            return
        before = member.info
        member.info = info
        member.registered = True
        if info.epoch != before.epoch:
            logger.info("worker_registered_anew worker_id=%s epoch=%x", info.worker_id, info.epoch)
        if info.model.model_id != before.model.model_id:
            member.stream = None
        if member.stream is not None:
            member.stream.expect(info)

    def _admit(self, member: Member[StreamT], refusal: str) -> None:
        if refusal and refusal != member.refusal:
            logger.warning("worker_refused worker_id=%s reason=%r", member.info.worker_id, refusal)
        member.refusal = refusal
        if refusal:
            member.stream = None
        elif member.stream is None:
            member.stream = self._make_stream(member.info)
            self._report(member)

    def _report(self, member: Member[StreamT] | None) -> None:
        """Passes on the last report, as soon as there is both that and the worker."""
        if member is None or member.stream is None:
            return
        load = self._loads.get(member.info.worker_id)
        if load is not None:
            self._on_report(member.info, load, member.stream.unacknowledged(load))

    # What the rest of the master asks

    def __iter__(self) -> Iterator[Member[StreamT]]:
        return iter(self._members.values())

    def info(self, worker_id: WorkerId) -> WorkerInfo | None:
        """None: it is not known any more."""
        member = self._members.get(worker_id)
        return None if member is None else member.info

    def load_of(self, worker_id: WorkerId) -> WorkerLoad | None:
        """The last report of a worker that is registered."""
        return self._loads.get(worker_id)

    def streams(self) -> set[StreamT]:
        """Those that should be running now."""
        return {member.stream for member in self if member.stream is not None}

    def count_states(self) -> dict[MemberState, int]:
        """Workers per state, zeros included."""
        counts = dict.fromkeys(MemberState, 0)
        for member in self:
            counts[member.state] += 1
        return counts

    def model_cards(self) -> list[ModelCard]:
        """Models that can be served now. A length holds on every worker of the model."""
        cards: dict[str, ModelCard] = {}
        for member in self._usable():
            card = member.info.model
            other = cards.get(card.model_id)
            if other is None or card.max_model_len < other.max_model_len:
                cards[card.model_id] = card
        return [cards[model_id] for model_id in sorted(cards)]

    def usable(
        self, model_id: str, excluded: AbstractSet[WorkerId] = frozenset()
    ) -> list[Member[StreamT]]:
        """The workers that may get a request of the model, by id; never empty.

        Raises: UnknownModel, NoWorker.
        """
        ready, suspect = [], []
        for member in self._of_model(model_id):
            if excluded and member.info.worker_id in excluded:
                continue
            state = member.state
            if state is MemberState.READY:
                ready.append(member)
            elif state is MemberState.SUSPECT:
                suspect.append(member)
        if ready or suspect:
            return ready or suspect
        if model_id in self._groups or not self._groups:
            raise NoWorker("no worker can serve at the moment; try again", retry_after_s=1)
        raise UnknownModel(f"no worker serves the model {model_id!r}", param="model")

    def candidates(
        self, model_id: str, excluded: AbstractSet[WorkerId] = frozenset()
    ) -> list[Candidate]:
        """`usable`, as a policy sees it. Raises: UnknownModel, NoWorker."""
        candidates = []
        for member in self.usable(model_id, excluded):
            assert member.stream is not None
            load = self._loads.get(member.info.worker_id)
            unreported = member.stream.unreported(load)
            candidates.append(Candidate(member.info.worker_id, load, unreported))
        return candidates

    def cache_root(self, model_id: str) -> CacheRoot:
        """What the blocks of a model that was ever here are named by."""
        return self._groups[model_id].root

    def block_addresses(self, model_id: str) -> Mapping[WorkerId, str]:
        """Where those of the model's workers that answer serve blocks to others."""
        addresses = self._block_addresses.get(model_id)
        if addresses is None:
            addresses = self._block_addresses[model_id] = {
                member.info.worker_id: member.info.block_address
                for member in self._usable()
                if member.model_id == model_id and member.info.block_address
            }
        return addresses

    def leaving_block_addresses(self, model_id: str) -> Mapping[WorkerId, str]:
        """The same of those that take no requests any more."""
        return {
            member.info.worker_id: member.info.block_address
            for member in self._of_model(model_id)
            if member.state is MemberState.DRAINING and member.info.block_address
        }

    def _of_model(self, model_id: str) -> list[Member[StreamT]]:
        members = self._by_model.get(model_id)
        if members is None:
            members = [member for member in self if member.model_id == model_id]
            members.sort(key=lambda member: member.info.worker_id)
            self._by_model[model_id] = members
        return members

    def answers(self, worker_id: WorkerId) -> bool:
        """Whether there is a connection to the worker, whatever etcd says of it."""
        member = self._members.get(worker_id)
        if member is None or member.stream is None:
            return False
        return member.stream.state is not StreamState.CONNECTING

    def stream(self, worker_id: WorkerId) -> StreamT:
        """The stream of one of the `candidates`."""
        stream = self._members[worker_id].stream
        assert stream is not None
        return stream

    def _usable(self) -> Iterator[Member[StreamT]]:
        return (m for m in self if m.state in (MemberState.READY, MemberState.SUSPECT))


def _worker_id(kv: KeyValue) -> WorkerId:
    return WorkerId(kv.key.rpartition("/")[2])
