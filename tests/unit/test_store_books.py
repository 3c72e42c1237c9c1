"""What is written into the shared store, what is known of it, and what it is asked: without one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

from xllm.cache.block_pool import BlockEvent, BlockEventKind
from xllm.cache.mover import Mover
from xllm.cache.slab_format import Buffer, checksum_of
from xllm.cache.store_book import StoreBook
from xllm.cache.store_client import StoreSlots
from xllm.cache.store_codes import StoreOutcome, outcome_of
from xllm.cache.store_jobs import Ask, BlockToPut, Get, Put, Remove
from xllm.cache.store_object import (
    TRAILER_BYTES,
    decode_trailer,
    encode_trailer,
    key_of,
    key_prefix,
    object_bytes,
)
from xllm.cache.store_tier import ASK_TIMEOUT_S, StoreTier
from xllm.cache.store_wire import Op, Request
from xllm.errors import StoreUnavailable
from xllm.protocol import BlockHash

BLOCK_BYTES = 4096
DONE = StoreOutcome.DONE
NAMES = [BlockHash(bytes([i]) * 16) for i in range(20)]
ROOT = BlockHash(b"r" * 16)


def test_a_trailer_is_of_one_block_and_one_length() -> None:
    trailer = encode_trailer(NAMES[1], b"c" * 16, BLOCK_BYTES)
    assert len(trailer) == TRAILER_BYTES
    assert decode_trailer(trailer, NAMES[1], BLOCK_BYTES) == b"c" * 16
    assert decode_trailer(trailer, NAMES[2], BLOCK_BYTES) is None
    assert decode_trailer(trailer, NAMES[1], BLOCK_BYTES + 1) is None
    assert decode_trailer(trailer[:-1], NAMES[1], BLOCK_BYTES) is None
    assert decode_trailer(bytes(TRAILER_BYTES), NAMES[1], BLOCK_BYTES) is None


def test_no_changed_bit_of_a_trailer_is_believed() -> None:
    trailer = encode_trailer(NAMES[1], b"c" * 16, BLOCK_BYTES)
    for bit in range(8 * TRAILER_BYTES):
        changed = bytearray(trailer)
        changed[bit // 8] ^= 1 << bit % 8
        assert decode_trailer(bytes(changed), NAMES[1], BLOCK_BYTES) is None


def test_keys_are_names_under_their_root() -> None:
    assert key_of(key_prefix(ROOT), NAMES[1]) == f"xllm/{b'r'.hex() * 16}/{'01' * 16}"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        *((0, "done"), (4160, "done"), (-705, "done"), (-704, "absent"), (-707, "absent")),
        *((-200, "full"), (-900, "unreachable"), (-800, "failed"), (-1, "failed")),
        (-123456, "failed"),
    ],
)
def test_codes_of_the_client(code: int, outcome: str) -> None:
    assert outcome_of(code).value == outcome


def test_a_book_is_bounded_and_tells_what_changed() -> None:
    book = StoreBook(max_names=3)
    book.add(NAMES[:3])
    book.touch([NAMES[0]])
    book.add([NAMES[3], NAMES[0]])
    assert [book.knows(name) for name in NAMES[:4]] == [True, False, True, True]
    stored, removed = BlockEventKind.STORED, BlockEventKind.REMOVED
    assert book.take_events() == [
        *(BlockEvent(stored, name) for name in NAMES[:3]),
        *(BlockEvent(removed, NAMES[1]), BlockEvent(stored, NAMES[3])),
    ]
    book.remove([NAMES[2], NAMES[9]])
    assert book.take_events() == [BlockEvent(removed, NAMES[2])]
    assert book.clear() == 2
    assert book.clear() == 0
    assert book.take_events() == [BlockEvent(BlockEventKind.CLEARED)]


def test_events_of_a_book_add_up_to_it() -> None:
    rng = Random(0)
    book = StoreBook(max_names=8)
    held: set[BlockHash | None] = set()
    for _ in range(300):
        some = rng.sample(NAMES, 3)
        rng.choice((book.add, book.add, book.remove, book.touch))(some)
        if rng.random() < 0.02:
            book.clear()
        book.check_invariants()
        for event in book.take_events():
            if event.kind is BlockEventKind.STORED:
                assert event.hash not in held
                held.add(event.hash)
            elif event.kind is BlockEventKind.REMOVED:
                held.remove(event.hash)
            else:
                held.clear()
        assert held == {name for name in NAMES if book.knows(name)}


class FakeDevice:
    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self.blocks = np.zeros((8, BLOCK_BYTES), dtype=np.uint8)

    def copy_out(self, block_ids: Any, targets: Any) -> None:
        for block_id, target in zip(block_ids, targets, strict=True):
            target[:BLOCK_BYTES] = self.blocks[block_id]

    def copy_in(self, block_ids: Any, sources: Any) -> None:
        for block_id, source in zip(block_ids, sources, strict=True):
            self.blocks[block_id] = source

    def view(self, block_id: int) -> Buffer:
        view: Buffer = self.blocks[block_id]
        return view


class FakeClient:
    """A store in a dict, at the place of `StoreClient`: `do` does the next job, like a lane."""

    prefix = key_prefix(ROOT)

    def __init__(self, mover: Mover) -> None:
        self.device = FakeDevice()
        self.slots = StoreSlots(BLOCK_BYTES)
        self.is_attached = True
        self.generation = 1
        self.num_detachments = 0
        self.objects: dict[str, bytes] = {}
        self.code: int | None = None
        """Of every key, instead of what happens."""
        self.jobs: list[tuple[Any, Any]] = []
        self._mover = mover
        self._memory = np.zeros((self.slots.num_slots, self.slots.stride), dtype=np.uint8)

    def slot(self, index: int) -> Buffer:
        slot: Buffer = self._memory[index]
        return slot

    def start(self, job: Any, transfer: Any) -> None:
        self.jobs.append((job, transfer))

    def close(self, timeout_s: float) -> None:
        pass

    def do(self) -> None:
        job, transfer = self.jobs.pop(0)
        error = None
        try:
            job.run(self, self.call, range(self.slots.num_get))
        except StoreUnavailable as caught:
            error = caught
        if transfer is not None:
            self._mover.end_elsewhere(transfer, error, wake=False)
            for ended in self._mover.take_ended():
                ended.on_end(ended)

    def call(self, request: Request) -> list[int]:
        if self.code is not None:
            return [self.code] * len(request.keys)
        return list(map(self._do_one(request), request.keys, request.offsets or request.keys))

    def _do_one(self, request: Request) -> Callable[[str, Any], int]:
        memory, objects = self._memory.reshape(-1), self.objects

        def exist(key: str, _: Any) -> int:
            return int(key in objects)

        def get(key: str, offset: int) -> int:
            if key not in objects:
                return -704
            value = np.frombuffer(objects[key], dtype=np.uint8)
            memory[offset : offset + len(value)] = value
            return len(value)

        def put(key: str, offset: int) -> int:
            objects.setdefault(key, memory[offset : offset + request.size].tobytes())
            return 0

        def remove(key: str, _: Any) -> int:
            return 0 if objects.pop(key, None) is not None else -704

        def clear(prefix: str, _: Any) -> int:
            for key in [key for key in objects if key.startswith(prefix)]:
                del objects[key]
            return 0

        return {Op.EXIST: exist, Op.GET: get, Op.PUT: put, Op.REMOVE: remove, Op.CLEAR: clear}[
            request.op
        ]


class Rig:
    def __init__(self) -> None:
        self.now = 0.0
        self.mover = Mover(0)
        self.client = FakeClient(self.mover)
        self.tier = StoreTier(self.client, self.mover, lambda: self.now)  # type: ignore[arg-type]
        self.tier.poll()

    def put(self, *names: BlockHash) -> None:
        blocks = []
        for name in names:
            slot, target = self.tier.take_slot()
            target[:BLOCK_BYTES] = name[0]
            blocks.append(BlockToPut(name, slot, checksum_of(target[:BLOCK_BYTES])))
        self.tier.put(blocks)
        self.client.do()
        self.tier.check_invariants()

    def get(self, *names: BlockHash) -> list[StoreOutcome]:
        job = Get(names, list(range(len(names))))
        job.run(self.client, self.client.call, range(self.client.slots.num_get))
        self.tier.loaded(names, job.outcomes)
        return job.outcomes

    def damage(self, name: BlockHash, value: bytes | None = None) -> None:
        key = key_of(FakeClient.prefix, name)
        old = self.client.objects[key]
        self.client.objects[key] = bytes([old[0] ^ 1]) + old[1:] if value is None else value


def test_what_was_put_is_known_and_comes_back() -> None:
    rig = Rig()
    rig.put(*NAMES[:3])
    assert [rig.tier.has(name) for name in NAMES[:4]] == [True, True, True, False]
    assert rig.tier.is_idle
    assert rig.get(*NAMES[:3]) == [DONE] * 3
    assert [int(block[-1]) for block in rig.client.device.blocks[:3]] == [0, 1, 2]


def test_a_damaged_object_is_removed_so_that_it_can_be_put_again() -> None:
    rig = Rig()
    rig.put(*NAMES[:4])
    rig.damage(NAMES[1])
    rig.damage(NAMES[2], b"short")
    rig.damage(NAMES[3], bytes(object_bytes(BLOCK_BYTES)))
    corrupt = StoreOutcome.CORRUPT
    assert rig.get(*NAMES[:4]) == [DONE, corrupt, corrupt, corrupt]
    assert rig.tier.counters.num_corrupt == 3
    assert [rig.tier.has(name) for name in NAMES[:4]] == [True, False, False, False]
    rig.client.do()
    assert len(rig.client.objects) == 1


def test_an_object_under_a_wrong_name_is_damaged() -> None:
    rig = Rig()
    rig.put(*NAMES[:2])
    rig.damage(NAMES[0], rig.client.objects[key_of(FakeClient.prefix, NAMES[1])])
    assert rig.get(NAMES[0]) == [StoreOutcome.CORRUPT]


def test_what_was_evicted_meanwhile_is_a_miss() -> None:
    rig = Rig()
    rig.put(*NAMES[:2])
    rig.client.objects.clear()
    assert rig.get(*NAMES[:2]) == [StoreOutcome.ABSENT] * 2
    assert rig.tier.counters.num_absent == 2
    assert not rig.tier.has(NAMES[0])


def test_one_question_for_a_prompt_and_for_all_that_begin_like_it() -> None:
    rig = Rig()
    rig.put(*NAMES[:2])
    rig.tier.book.clear()
    question = rig.tier.ask(NAMES[:5])
    assert question is not None
    assert question.is_open
    assert rig.tier.ask(NAMES[:3]) is question
    assert rig.tier.next_deadline == ASK_TIMEOUT_S
    rig.client.do()
    assert not question.is_open
    assert [rig.tier.has(name) for name in NAMES[:3]] == [True, True, False]
    assert rig.tier.next_deadline is None
    assert rig.client.jobs == []


def test_who_does_not_answer_in_time_is_not_asked_again_before_it_does() -> None:
    rig = Rig()
    question = rig.tier.ask(NAMES[:2])
    assert question is not None
    rig.now = ASK_TIMEOUT_S
    assert not question.is_open
    assert rig.tier.next_deadline is None
    assert rig.tier.ask(NAMES[5:7]) is None
    rig.client.do()
    assert rig.tier.ask(NAMES[5:7]) is not None


def test_a_master_that_does_not_answer_fails_jobs_as_a_whole() -> None:
    rig = Rig()
    rig.client.code = -900
    rig.put(*NAMES[:2])
    assert not rig.tier.has(NAMES[0])
    assert rig.tier.counters.num_failed == 2
    for job in (Ask(NAMES), Get(NAMES[:2], [0, 1]), Remove(NAMES), Put([])):
        if not isinstance(job, Put):
            with pytest.raises(StoreUnavailable):
                job.run(rig.client, rig.client.call, range(4))


def test_a_full_pool_is_no_failure() -> None:
    rig = Rig()
    rig.client.code = -200
    rig.put(*NAMES[:2])
    assert (rig.tier.counters.num_full, rig.tier.counters.num_failed) == (2, 0)
    assert not rig.tier.has(NAMES[0])


def test_a_store_that_goes_takes_all_knowledge_with_it() -> None:
    rig = Rig()
    rig.put(*NAMES[:2])
    rig.tier.take_events()
    rig.client.is_attached = False
    rig.client.generation += 1
    rig.tier.poll()
    assert rig.tier.take_events() == [BlockEvent(BlockEventKind.CLEARED)]
    assert rig.tier.ask(NAMES) is None
    assert rig.tier.statistics().block_s(BLOCK_BYTES) is None
    rig.client.is_attached = True
    rig.client.generation += 1
    rig.tier.poll()
    assert not rig.tier.has(NAMES[0])
    assert rig.tier.statistics().block_s(BLOCK_BYTES) == BLOCK_BYTES / 500e6


def test_a_put_that_ends_after_a_detachment_is_not_believed() -> None:
    rig = Rig()
    slot, target = rig.tier.take_slot()
    rig.tier.put([BlockToPut(NAMES[0], slot, checksum_of(target[:BLOCK_BYTES]))])
    rig.client.generation += 2
    rig.tier.poll()
    rig.client.do()
    assert not rig.tier.has(NAMES[0])
    assert rig.tier.is_idle


def test_clear_is_for_everybody_under_the_root() -> None:
    rig = Rig()
    rig.put(*NAMES[:3])
    rig.client.objects["xllm/other/key"] = b""
    assert rig.tier.clear() == 3
    rig.client.do()
    assert list(rig.client.objects) == ["xllm/other/key"]


def test_slots_are_whole_pages_and_belong_to_one_lane() -> None:
    slots = StoreSlots(737_280)
    assert slots.stride % 4096 == 0
    assert slots.stride >= object_bytes(737_280)
    lanes = [set(slots.get_slots(lane)) for lane in range(4)]
    lanes.append(set(slots.put_slots))
    assert sum(map(len, lanes)) == slots.num_slots == len(set().union(*lanes))
    assert StoreSlots(1 << 30).num_get == 1
