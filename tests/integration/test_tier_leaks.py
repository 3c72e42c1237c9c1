"""Scheduler, cache and the real tiers on a real disk, over a model whose KV says which tokens it
belongs to: ten thousand random requests, faults included, and nothing is left over."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.simulation import BLOCK_SIZE, Simulation, expected_output, prompt_of
from xllm.cache.admin import CacheAdmin
from xllm.cache.disk_tier import DiskTier, DiskTierConfig
from xllm.cache.eviction import EvictionPolicyName
from xllm.cache.host_tier import HostMemoryBlocks, HostTier
from xllm.cache.mover import Mover
from xllm.cache.slab_format import SlabGeometry
from xllm.cache.stores import DiskWritePolicy
from xllm.cache.tier import TierName
from xllm.cache.tiers import Tiers
from xllm.protocol import BlockHash, FinishReason

NUM_BLOCKS = 40
BLOCK_BYTES = 8 * BLOCK_SIZE


class UnreliableIO:
    """The system's calls, some of which fail, come short, or bring a wrong bit."""

    def __init__(self, rng: Random) -> None:
        self.fault_share = 0.0
        self._rng = rng

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        fault = self._draw("error", "short", "flip")
        if fault == "error":
            raise OSError(errno.EIO, "injected")
        if fault == "short":
            return os.preadv(fd, buffers[:1], offset)
        num_bytes = os.preadv(fd, buffers, offset)
        if fault == "flip" and num_bytes:
            target = buffers[0].cast("B")
            target[self._rng.randrange(min(len(target), BLOCK_BYTES))] ^= 1
        return num_bytes

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        fault = self._draw("error", "full", "short")
        if fault in ("error", "full"):
            raise OSError(errno.EIO if fault == "error" else errno.ENOSPC, "injected")
        return os.pwritev(fd, buffers[:1] if fault == "short" else buffers, offset)

    def _draw(self, *faults: str) -> str | None:
        return self._rng.choice(faults) if self._rng.random() < self.fault_share else None


class TieredSimulation(Simulation):
    """With memory that tiers can copy, a clock of its own, and transfers that end when told."""

    def __init__(self, directory: Path, rng: Random, policy: DiskWritePolicy, host: bool) -> None:
        self.now = 0.0
        self.rng = rng
        self.io = UnreliableIO(rng)
        self.mover = Mover(0)
        self._memory = np.zeros(NUM_BLOCKS * BLOCK_SIZE, dtype=np.int64)
        blocks = self._memory.view(np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)
        root = BlockHash(b"r" * 16)
        disk = DiskTierConfig(
            directory=directory,
            size_bytes=SlabGeometry(60, BLOCK_BYTES).file_bytes + (72 << 10),
            block_bytes=BLOCK_BYTES,
            root=root,
            eviction_policy=EvictionPolicyName.GRADED,
        )
        clock = self.clock
        host_tier = None
        if host:
            graded = EvictionPolicyName.GRADED
            host_tier = HostTier(30, BLOCK_BYTES, eviction_policy=graded, clock=clock)
        self.lower = Tiers(
            HostMemoryBlocks(blocks),
            self.mover,
            host=host_tier,
            disk=DiskTier(disk, clock=clock, io=self.io),
            disk_write_policy=policy,
            clock=clock,
            cold_device_blocks=lambda limit: self.kv_cache.pool.coldest(limit),
        )
        super().__init__(NUM_BLOCKS, tiers=self.lower, max_model_len=100, prefetch_timeout_s=0.5)
        self.admin = CacheAdmin(
            self.kv_cache, self.lower, max_pinned_blocks=NUM_BLOCKS - 25, clock=clock
        )

    def clock(self) -> float:
        return self.now

    def make_slots(self, num_slots: int) -> Any:
        return self._memory

    def kv(self, tokens: list[int]) -> int:
        return hash(tuple(tokens))

    def turn(self, *, quiet: bool = False) -> None:
        """A step, and some of the transfers that wait."""
        self.now += 0.01 if quiet else self.rng.choice((0.01, 0.1, 1.0))
        self.admin.expire()
        self.step()
        for _ in range(1000 if quiet else self.rng.randrange(4)):
            transfer = self.mover.take_work()
            if transfer is None:
                break
            self.mover.run(transfer)
        self.sequences = [s for s in self.sequences if s.finish_reason is None]

    def settle(self) -> None:
        for _ in range(2000):
            self.turn(quiet=True)
            if not self.scheduler.has_work and self.lower.is_idle:
                return
        pytest.fail("it does not come to rest")

    def check_nothing_is_left(self) -> None:
        assert self.kv_cache.pool.num_free == NUM_BLOCKS
        for tier, table in self.lower.statistics().tables.items():
            assert (table.num_pinned, table.num_reserved) == (0, 0), tier
        self.lower.check_invariants()

    def check(self) -> None:
        """Every few steps: deriving all books from scratch is most of the time that this takes."""
        if len(self.plans) % 8 == 0:
            super().check()
            self.lower.check_invariants()


@pytest.mark.parametrize("host", [True, False], ids=["host", "no_host"])
@pytest.mark.parametrize("policy", DiskWritePolicy)
def test_random_requests_leave_no_pin_and_no_slot_behind(
    tmp_path: Path, policy: DiskWritePolicy, host: bool
) -> None:
    rng = Random(f"{policy}{host}")
    sim = TieredSimulation(tmp_path, rng, policy, host)
    prompts: dict[str, tuple[list[int], int]] = {}
    num_requests = 1700
    while num_requests:
        if len(sim.scheduler.waiting) < 6 and rng.random() < 0.8:
            prompt = prompt_of(rng.randrange(1, 44), seed=rng.randrange(12))
            prompt = prompt[: rng.randrange(1, len(prompt) + 1)] + prompt_of(3, rng.randrange(3))
            max_tokens = rng.choice((1, 2, 20))
            request_id = sim.submit(prompt, max_tokens)
            prompts[request_id] = (prompt, max_tokens)
            num_requests -= 1
        _disturb(sim, rng)
        sim.turn()
        _check_outputs(sim, prompts)
    sim.io.fault_share = 0.0
    sim.now += 1000.0
    sim.settle()
    _check_outputs(sim, prompts)
    sim.check_nothing_is_left()
    statistics = sim.lower.statistics()
    assert statistics.blocks_loaded[TierName.DISK] > 50
    assert not host or statistics.blocks_loaded[TierName.HOST] > 20
    assert min(statistics.loads.num_timeouts, statistics.loads.num_cancelled) > 5
    assert sim.scheduler.num_preemptions > 5
    sim.lower.close(0.0)


def _disturb(sim: TieredSimulation, rng: Random) -> None:
    """What else happens to a worker, now and then."""
    draw = rng.random()
    if draw < 0.04:
        open_sequences = [*sim.scheduler.waiting, *sim.scheduler.running]
        open_sequences = [s for s in open_sequences if s.load is not None] or open_sequences
        if open_sequences:
            sim.scheduler.abort(rng.choice(open_sequences).group)
    elif draw < 0.05:
        sim.admin.clear(rng.choice((None, TierName.DEVICE, TierName.HOST, TierName.DISK)))
    elif draw < 0.08:
        prompt = prompt_of(rng.randrange(1, 30), seed=rng.randrange(12))
        if rng.random() < 0.5:
            sim.admin.unpin(prompt, "")
        elif len(sim.kv_cache.pool.held_block_ids) == 0:
            sim.admin.pin(prompt, "", ttl_s=rng.choice((0.1, 5.0)))
    elif draw < 0.09:
        sim.io.fault_share = rng.choice((0.0, 0.0, 0.02, 0.3))


def _check_outputs(sim: TieredSimulation, prompts: dict[str, tuple[list[int], int]]) -> None:
    for key, reason in list(sim.finished.items()):
        prompt, max_tokens = prompts.pop(key[0])
        if reason is not FinishReason.ABORT:
            assert sim.outputs[key] == expected_output(prompt, max_tokens)
        del sim.finished[key]
