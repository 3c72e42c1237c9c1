"""A scheduler driven by a fake model whose tokens depend on the context alone, and fake memory.

The fake draws sha256(all tokens so far): whatever the scheduler does (chunks, preemption, sharing,
forks), a sequence must end with the tokens that it would have had alone.
"""

from __future__ import annotations

import random
from hashlib import sha256
from itertools import takewhile
from typing import Any

import pytest

from xllm.cache.block_hash import CacheRoot
from xllm.cache.block_pool import BlockPool
from xllm.cache.kv_cache import KVCache
from xllm.cache.loads import BlockSource, LoadSpan
from xllm.cache.tier import TierName
from xllm.engine.request import Sequence, SequenceState
from xllm.engine.scheduler import (
    Advance,
    Scheduler,
    SchedulerLimits,
    StepPlan,
)
from xllm.engine.step_cost import StepCost
from xllm.protocol import BlockHash, FinishReason, GenerateRequest, SamplingParams

BLOCK_SIZE = 4
EOS = 0


def next_token(tokens: list[int], index: int = 0) -> int:
    digest = sha256(repr((tokens, index)).encode()).digest()
    return digest[0] % 50


def expected_output(prompt: list[int], max_tokens: int, index: int = 0) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, index))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class FakeTicket:
    def __init__(self, blocks: list[tuple[BlockHash, BlockSource, int]]) -> None:
        self.blocks = blocks
        self.num_arrived = 0
        self.busy_block_ids: list[int] = []
        self.spans: list[LoadSpan] = []

    @property
    def tiers(self) -> list[TierName]:
        return [source.tier for _, source, _ in self.blocks[: self.num_arrived]]


class FakeTiers:
    """One lower tier that takes all that the device evicts. Loads take some polls, and may end
    with a part, leaving transfers behind that write garbage a while later."""

    def __init__(self, seed: int = 0, failing: float = 0.0) -> None:
        self.simulation: Simulation | None = None
        self.stored: dict[BlockHash, list[tuple[int, ...] | None]] = {}
        self.num_loads = 0
        self._rng = random.Random(seed)
        self._failing = failing
        self._loading: list[FakeTicket] = []
        self._late: list[int] = []
        self._returned: list[int] = []

    def match(
        self, hashes: list[BlockHash], block_compute_s: float | None = None, *_: object
    ) -> list[BlockSource]:
        found = takewhile(lambda h: h in self.stored, hashes)
        return [BlockSource(TierName.HOST) for _ in found]

    def start_load(
        self, blocks: list[tuple[BlockHash, BlockSource, int]], timeout_s: float, trace: str = ""
    ) -> FakeTicket:
        ticket = FakeTicket(blocks)
        self.num_loads += 1
        self._loading.append(ticket)
        return ticket

    @property
    def lent_block_ids(self) -> list[int]:
        return []

    def cancel(self, ticket: FakeTicket) -> None:
        if ticket in self._loading:
            self._loading.remove(ticket)
            self._abandon(ticket, 0)

    def poll(self) -> list[FakeTicket]:
        assert self.simulation is not None
        for block_id in self._late:
            start = block_id * BLOCK_SIZE
            self.simulation.slots[start : start + BLOCK_SIZE] = [(-1,)] * BLOCK_SIZE
            self._returned.append(block_id)
        self._late = []
        done = [t for t in self._loading if self._rng.random() < 0.4]
        for ticket in done:
            self._loading.remove(ticket)
            fails = self._rng.random() < self._failing
            arrived = self._rng.randrange(len(ticket.blocks)) if fails else len(ticket.blocks)
            for block_hash, _, block_id in ticket.blocks[:arrived]:
                start = block_id * BLOCK_SIZE
                self.simulation.slots[start : start + BLOCK_SIZE] = self.stored[block_hash]
            self._abandon(ticket, arrived)
        return done

    def _abandon(self, ticket: FakeTicket, num_arrived: int) -> None:
        ticket.num_arrived = num_arrived
        rest = [block_id for _, _, block_id in ticket.blocks[num_arrived:]]
        ticket.busy_block_ids = rest[: self._rng.randrange(len(rest) + 1)]
        self._late += ticket.busy_block_ids

    def take_returned_blocks(self) -> list[int]:
        returned, self._returned = self._returned, []
        return returned

    def committed(self, block_hash: BlockHash, parent: BlockHash | None, block_id: int) -> None:
        pass

    def used(self, chain: list[BlockHash]) -> None:
        pass

    def evicted(self, block_hash: BlockHash, block_id: int) -> None:
        assert self.simulation is not None
        self.stored[block_hash] = self.simulation.block(block_id)

    def cleared(self) -> None:
        pass


class Simulation:
    """A scheduler, and memory: which token's KV is in each token slot, as a real cache would."""

    def __init__(
        self,
        num_blocks: int = 64,
        cost: StepCost | None = None,
        tiers: Any = None,
        **limits: int | bool,
    ) -> None:
        root = CacheRoot(fingerprint="f", kv_dtype="float32", block_size=BLOCK_SIZE)
        pool = BlockPool(num_blocks)
        self.tiers = tiers
        self.kv_cache = KVCache(pool, root, tiers=tiers)
        if isinstance(tiers, FakeTiers):
            tiers.simulation = self
        merged = {"max_tokens_per_batch": 32, "max_seqs_per_batch": 8, "max_model_len": 200}
        self.scheduler = Scheduler(
            self.kv_cache,
            SchedulerLimits(**(merged | limits)),  # type: ignore[arg-type]
            [EOS],
            cost,
        )
        self.slots: Any = self.make_slots(num_blocks * BLOCK_SIZE)
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], FinishReason] = {}
        self.sequences: list[Sequence] = []
        self.num_submitted = 0
        self.computed_tokens = 0
        self.plans: list[StepPlan] = []

    def make_slots(self, num_slots: int) -> Any:
        """Memory of that many tokens' KV."""
        return [None] * num_slots

    def kv(self, tokens: list[int]) -> Any:
        """What is stored for the last of `tokens`: it depends on all before it."""
        return tuple(tokens)

    def submit(
        self, prompt: list[int], max_tokens: int, n: int = 1, priority: int = 0, salt: str = ""
    ) -> str:
        request_id = f"r{self.num_submitted}"
        request = GenerateRequest(
            request_id=request_id,
            model_id="m",
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens),
            n=n,
            priority=priority,
            salt=salt,
        )
        first, *children = [Sequence(request, i, self.num_submitted) for i in range(n)]
        first.children = children
        self.sequences += [first, *children]
        self.num_submitted += n
        self.scheduler.add(first)
        return request_id

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        for source, target in plan.copies:
            for offset in range(BLOCK_SIZE):
                self.slots[target * BLOCK_SIZE + offset] = self.slots[source * BLOCK_SIZE + offset]
        drawn: list[int] = []
        for item in plan.scheduled:
            drawn += self._run(item.seq, item.start, item.num_tokens, item.num_samples)
        self.computed_tokens += plan.num_tokens
        for advance in self.scheduler.complete(plan, drawn):
            self._record(advance)
        self.check()
        return plan

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            plan = self.step()
            is_loading = any(s.state is SequenceState.LOADING for s in self.sequences)
            assert plan.scheduled or is_loading, "work, but nothing runs"
        pytest.fail("the scheduler did not finish")

    def check(self) -> None:
        holding = (SequenceState.RUNNING, SequenceState.LOADING)
        holders = [s for s in self.sequences if s.state in holding]
        assert all(not s.block_table for s in self.sequences if s not in holders)
        self.kv_cache.check_invariants(holders)  # type: ignore[arg-type]

    def block(self, block_id: int) -> list[tuple[int, ...] | None]:
        return self.slots[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE]

    def _slot(self, seq: Sequence, position: int) -> int:
        block_id = seq.block_table[position // BLOCK_SIZE]
        return block_id * BLOCK_SIZE + position % BLOCK_SIZE

    def _run(self, seq: Sequence, start: int, num_tokens: int, num_samples: int) -> list[int]:
        assert num_tokens > 0
        for position in range(start, start + num_tokens):
            slot = self._slot(seq, position)
            if position >= seq.num_written_tokens:
                block_id = seq.block_table[position // BLOCK_SIZE]
                assert self.kv_cache.pool.hash_of(block_id) is None, "a named block is written"
                self.slots[slot] = self.kv(seq.token_ids[: position + 1])
        end = start + num_tokens
        for position in range(end):
            stored = self.slots[self._slot(seq, position)]
            assert stored == self.kv(seq.token_ids[: position + 1]), "somebody else's KV"
        if num_samples:
            assert end == seq.num_tokens
        return [next_token(seq.token_ids, seq.index + i) for i in range(num_samples)]

    def _record(self, advance: Advance) -> None:
        key = (advance.seq.request_id, advance.seq.index)
        tokens = self.outputs.setdefault(key, [])
        assert advance.offset == len(tokens)
        tokens += advance.token_ids
        assert key not in self.finished
        if advance.seq.finish_reason is not None:
            self.finished[key] = advance.seq.finish_reason


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 50) for _ in range(length)]
