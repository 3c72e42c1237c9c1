"""Pins for peers, over a device of plain memory and a host tier."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xllm.cache.block_pool import BlockPool
from xllm.cache.eviction import EvictionPolicyName
from xllm.cache.host_tier import HostMemoryBlocks, HostTier
from xllm.cache.lender import Lender, Loan
from xllm.cache.slab_format import checksum_of
from xllm.cache.tier import TierName
from xllm.protocol import BlockHash

BLOCK_BYTES = 64


def name(i: int) -> BlockHash:
    return BlockHash(i.to_bytes(16, "big"))


class Rig:
    """A device cache whose blocks hold their name, and a host tier."""

    def __init__(self, num_blocks: int = 40, host_slots: int = 0) -> None:
        self.memory = np.zeros((num_blocks, BLOCK_BYTES), dtype=np.uint8)
        self.pool = BlockPool(num_blocks, self._evicted)
        self.host = None
        if host_slots:
            self.host = HostTier(
                host_slots, BLOCK_BYTES, eviction_policy=EvictionPolicyName.LRU, clock=lambda: 0.0
            )
        self.lender = Lender(self.pool, HostMemoryBlocks(self.memory), self.host, None)

    def _evicted(self, block_hash: BlockHash, block_id: int) -> None:
        self.lender.evicted(block_id)

    def compute(self, ids: list[int], version: int = 0) -> None:
        """`version` stands for a rounding: the same name may have other bytes the next time."""
        block_ids = self.pool.allocate(len(ids))
        assert block_ids is not None
        for i, block_id in zip(ids, block_ids, strict=True):
            self.memory[block_id] = i * 4 + version
            self.pool.commit(block_id, name(i))
        self.pool.release(block_ids)

    def lend(self, ids: list[int]) -> Loan:
        return self.lender.lend([name(i) for i in ids])

    def send(self, loan: Loan) -> list[bytes | None]:
        """What the serving thread does."""
        sent: list[bytes | None] = []
        for block in loan.blocks:
            if block is None:
                sent.append(None)
                continue
            assert block.payload is not None
            if block.checksum is None:
                block.checksum = checksum_of(block.payload)
            assert block.checksum == checksum_of(block.payload)
            sent.append(bytes(block.payload))
            loan.num_sent[block.tier] = loan.num_sent.get(block.tier, 0) + 1
        return sent


def test_what_is_lent_is_pinned_until_it_is_given_back() -> None:
    rig = Rig(num_blocks=32)
    rig.compute([1, 2])
    loan = rig.lend([1, 9])
    assert loan.blocks[1] is None
    assert rig.lender.lent_block_ids == [0]
    rig.compute(list(range(20, 51)))
    assert rig.pool.lookup(name(2)) is None
    assert rig.pool.lookup(name(1)) == 0
    assert rig.send(loan)[0] == bytes([4]) * BLOCK_BYTES
    rig.lender.end(loan)
    rig.pool.check_references({})
    assert rig.lender.snapshot().served[TierName.DEVICE] == 1
    assert rig.lender.snapshot().num_missed == 1


def test_a_checksum_is_computed_once_and_forgotten_with_the_name() -> None:
    rig = Rig()
    rig.compute([1])
    for _ in range(2):
        loan = rig.lend([1])
        rig.send(loan)
        rig.lender.end(loan)
    loan = rig.lend([1])
    assert loan.blocks[0] is not None
    assert loan.blocks[0].checksum is not None
    rig.lender.cleared()
    rig.pool.clear()
    rig.lender.end(loan)
    rig.compute([1], version=1)
    again = rig.lend([1])
    assert again.blocks[0] is not None
    assert again.blocks[0].checksum is None
    rig.send(again)
    rig.lender.end(again)


def test_the_host_is_asked_first_because_it_has_the_checksum() -> None:
    rig = Rig(host_slots=4)
    assert rig.host is not None
    rig.compute([1, 2])
    slot = rig.host.table.prepare_store(name(1), None)
    assert slot is not None
    rig.host.slot(slot)[:BLOCK_BYTES] = 4
    rig.host.table.complete_store(slot, checksum_of(rig.host.slot(slot)[:BLOCK_BYTES]))
    loan = rig.lend([1, 2])
    assert [block and block.tier for block in loan.blocks] == [TierName.HOST, TierName.DEVICE]
    assert rig.host.table.statistics().num_pinned == 1
    rig.send(loan)
    rig.lender.end(loan)
    assert rig.host.table.statistics().num_pinned == 0


def contents(loan: Loan) -> list[bytes | None]:
    return [None if block is None else bytes(block.payload) for block in loan.blocks]  # type: ignore[arg-type]


@pytest.mark.parametrize("arrived", [False, True])
def test_what_a_peer_has_now_is_the_next_to_go_if_it_got_there(arrived: bool) -> None:
    rig = Rig(num_blocks=6)
    rig.compute([1, 2, 3])
    rig.compute([4, 5, 6])
    for i in (4, 5, 6):
        loan = rig.lend([i])
        if arrived:
            rig.send(loan)
            loan.num_sent[TierName.DEVICE] = 1
        rig.lender.end(loan)
    rig.compute([7])
    gone = [i for i in range(1, 7) if rig.pool.lookup(name(i)) is None]
    assert gone == [6 if arrived else 3]


@pytest.mark.parametrize("seed", range(10))
def test_random_histories_send_what_was_lent(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(num_blocks=32)
    loans: list[tuple[Loan, list[bytes | None]]] = []
    num_sent = 0
    for turn in range(150):
        action = rng.choice(["compute", "compute", "lend", "lend", "end", "end", "clear"])
        if action == "compute":
            ids = range(turn % 7, 48, rng.randint(3, 9))
            new = [i for i in ids if rig.pool.lookup(name(i)) is None]
            rig.compute(new[: rig.pool.num_free], version=turn % 4)
        elif action == "lend" and len(loans) < 5:
            ids = rng.sample(range(48), rig.lender.max_blocks)
            loan = rig.lend(list(ids))
            for i, payload in zip(ids, contents(loan), strict=True):
                assert payload is None or payload[0] // 4 == i
            loans.append((loan, contents(loan)))
        elif action == "clear" and rng.random() < 0.3:
            rig.lender.cleared()
            rig.pool.clear()
        elif action == "end" and loans:
            loan, lent = loans.pop(rng.randrange(len(loans)))
            assert rig.send(loan) == lent
            num_sent += len(lent) - lent.count(None)
            rig.lender.end(loan)
        rig.pool.check_invariants()
        held: dict[int, int] = {}
        for block_id in rig.lender.lent_block_ids:
            held[block_id] = held.get(block_id, 0) + 1
        rig.pool.check_references(held)
    assert num_sent > 10
