"""The scheduler under random load, with a fake model whose tokens depend on the context alone.

The fake draws sha256(all tokens so far): whatever the scheduler does (chunks, preemption, sharing,
forks), a sequence must end with the tokens that it would have had alone.
"""

import random
from hashlib import sha256

import pytest

from xllm.cache.block_hash import CacheRoot
from xllm.cache.block_pool import BlockPool
from xllm.cache.kv_cache import KVCache
from xllm.engine.request import Sequence, SequenceState
from xllm.engine.scheduler import (
    MIN_CHUNK_TOKENS,
    Advance,
    Scheduler,
    SchedulerLimits,
    StepPlan,
)
from xllm.engine.step_cost import StepCost, decode_work, prefill_work
from xllm.protocol import FinishReason, GenerateRequest, SamplingParams

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


class Simulation:
    """A scheduler, and memory: which token's KV is in each token slot, as a real cache would."""

    def __init__(
        self, num_blocks: int = 64, cost: StepCost | None = None, **limits: int | bool
    ) -> None:
        root = CacheRoot(fingerprint="f", kv_dtype="float32", block_size=BLOCK_SIZE)
        self.kv_cache = KVCache(BlockPool(num_blocks), root)
        merged = {"max_tokens_per_batch": 32, "max_seqs_per_batch": 8, "max_model_len": 200}
        self.scheduler = Scheduler(
            self.kv_cache,
            SchedulerLimits(**(merged | limits)),  # type: ignore[arg-type]
            [EOS],
            cost,
        )
        self.slots: list[tuple[int, ...] | None] = [None] * (num_blocks * BLOCK_SIZE)
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], FinishReason] = {}
        self.sequences: list[Sequence] = []
        self.computed_tokens = 0
        self.plans: list[StepPlan] = []

    def submit(
        self, prompt: list[int], max_tokens: int, n: int = 1, priority: int = 0, salt: str = ""
    ) -> str:
        request_id = f"r{len(self.sequences)}"
        request = GenerateRequest(
            request_id=request_id,
            model_id="m",
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens),
            n=n,
            priority=priority,
            salt=salt,
        )
        first, *children = [Sequence(request, i, len(self.sequences)) for i in range(n)]
        first.children = children
        self.sequences += [first, *children]
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
            assert plan.scheduled, "work, but nothing runs"
        pytest.fail("the scheduler did not finish")

    def check(self) -> None:
        holders = [s for s in self.sequences if s.state is SequenceState.RUNNING]
        assert all(not s.block_table for s in self.sequences if s not in holders)
        self.kv_cache.check_invariants(holders)  # type: ignore[arg-type]

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
                self.slots[slot] = tuple(seq.token_ids[: position + 1])
        end = start + num_tokens
        for position in range(end):
            stored = self.slots[self._slot(seq, position)]
            assert stored == tuple(seq.token_ids[: position + 1]), "somebody else's KV"
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


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chunked", [True, False])
def test_random_load_gives_each_request_its_own_tokens(seed: int, chunked: bool) -> None:
    rng = random.Random(seed)
    sim = Simulation(num_blocks=30, enable_chunked_prefill=chunked, max_model_len=110)
    prefixes = [prompt_of(rng.randrange(1, 40), s) for s in range(4)]
    expected: dict[tuple[str, int], list[int]] = {}
    for i in range(40):
        prompt = rng.choice(prefixes)[: rng.randrange(1, 40)] + prompt_of(rng.randrange(0, 30), i)
        max_tokens = rng.randrange(1, 20)
        n = rng.choice([1, 1, 1, 3])
        request_id = sim.submit(prompt, max_tokens, n, priority=rng.randrange(2))
        for index in range(n):
            expected[request_id, index] = expected_output(prompt, max_tokens, index)
        for _ in range(rng.randrange(6)):
            if sim.scheduler.has_work:
                sim.step()
        if rng.random() < 0.1:
            victim = rng.choice(sim.sequences)
            sim.scheduler.abort(victim.group)
            for index in range(victim.group.n):
                if (victim.request_id, index) not in sim.finished:
                    del expected[victim.request_id, index]
                    sim.finished[victim.request_id, index] = FinishReason.ABORT
            sim.check()
    sim.run()
    for key, tokens in expected.items():
        assert sim.outputs[key] == tokens
        assert sim.finished[key] is (
            FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH
        )
    assert sim.kv_cache.pool.num_free == 30


def test_little_cache_preempts_and_all_finish() -> None:
    sim = Simulation(num_blocks=18, max_model_len=60)
    for i in range(8):
        sim.submit(prompt_of(20, i), 40)
    sim.run()
    assert sim.scheduler.num_preemptions > 0
    for i in range(8):
        assert sim.outputs[f"r{i}", 0] == expected_output(prompt_of(20, i), 40)


def test_decodes_come_first_and_prefill_is_chunked_beside_them() -> None:
    sim = Simulation(max_tokens_per_batch=16, max_tokens_per_chunk=8)
    sim.submit(prompt_of(5), 30)
    sim.step()
    sim.submit(prompt_of(40, 1), 4)
    plan = sim.step()
    assert plan.num_decodes == 1
    assert [(s.start, s.num_tokens) for s in plan.scheduled] == [(5, 1), (0, 8)]
    assert plan.scheduled[1].num_samples == 0


def test_a_prompt_alone_gets_the_whole_budget() -> None:
    sim = Simulation(max_tokens_per_batch=32, max_tokens_per_chunk=8)
    sim.submit(prompt_of(70), 1)
    assert [sim.step().num_tokens for _ in range(3)] == [32, 32, 6]


def test_beside_decodes_a_prompt_gets_what_keeps_the_step_short() -> None:
    cost = StepCost()
    for _ in range(50):
        for work in (decode_work(5), prefill_work(0, 10), prefill_work(30, 20)):
            cost.observe(work, 0.01 + 0.003 * work.rows)
    sim = Simulation(cost=cost)
    sim.submit(prompt_of(5), 30)
    sim.step()
    sim.submit(prompt_of(40, 1), 4)
    chunk = sim.step().scheduled[1].num_tokens
    assert cost.predict(decode_work(6) + prefill_work(0, chunk)) == pytest.approx(0.08, rel=0.2)
    assert MIN_CHUNK_TOKENS < chunk < 28


def test_a_prompt_gets_on_beside_slow_decodes() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(decode_work(5), 0.5)
    sim = Simulation(cost=cost)
    sim.submit(prompt_of(5), 30)
    sim.step()
    sim.submit(prompt_of(40, 1), 4)
    sim.submit(prompt_of(40, 2), 4)
    assert [s.num_tokens for s in sim.step().scheduled] == [1, MIN_CHUNK_TOKENS]


def test_without_chunks_a_prompt_over_the_budget_runs_alone() -> None:
    sim = Simulation(max_tokens_per_batch=16, enable_chunked_prefill=False)
    sim.submit(prompt_of(8), 3)
    sim.submit(prompt_of(50, 1), 2)
    sim.run()
    assert 50 in [plan.num_tokens for plan in sim.plans]
    assert sim.outputs["r1", 0] == expected_output(prompt_of(50, 1), 2)


def test_the_same_new_prefix_is_computed_once() -> None:
    sim = Simulation(max_tokens_per_batch=16)
    prefix = prompt_of(40)
    for i in range(5):
        sim.submit(prefix + prompt_of(2, 100 + i), 1)
    sim.run()
    assert sim.computed_tokens == 42 + 4 * 2


def test_a_fully_cached_prompt_runs_one_token_and_writes_nothing() -> None:
    sim = Simulation()
    prompt = prompt_of(16)
    sim.submit(prompt, 1)
    sim.run()
    before = list(sim.slots)
    sim.submit(prompt, 1)
    plan = sim.step()
    assert [(s.start, s.num_tokens) for s in plan.scheduled] == [(15, 1)]
    assert sim.slots == before
    assert sim.sequences[-1].cached_tokens == 15


def test_salts_do_not_share() -> None:
    sim = Simulation()
    sim.submit(prompt_of(16), 1, salt="a")
    sim.run()
    sim.submit(prompt_of(16), 1, salt="b")
    assert sim.step().num_tokens == 16


def test_samples_share_the_prompt() -> None:
    sim = Simulation()
    sim.submit(prompt_of(18), 6, n=4)
    plan = sim.step()
    assert (plan.num_tokens, plan.scheduled[0].num_samples) == (18, 4)
    running = sim.scheduler.running
    assert len({tuple(s.block_table[:4]) for s in running}) == 1
    assert len({s.block_table[4] for s in running}) == len(running)
    sim.run()
    for index in range(4):
        assert sim.outputs["r0", index] == expected_output(prompt_of(18), 6, index)
    assert sim.computed_tokens < 18 + 4 * 6


def test_more_samples_than_seats_still_finish() -> None:
    sim = Simulation(max_seqs_per_batch=2)
    sim.submit(prompt_of(18), 5, n=5)
    sim.run()
    for index in range(5):
        assert sim.outputs["r0", index] == expected_output(prompt_of(18), 5, index)


def test_urgent_requests_overtake_waiting_ones() -> None:
    sim = Simulation(max_seqs_per_batch=1)
    sim.submit(prompt_of(4), 3)
    sim.step()
    sim.submit(prompt_of(4, 1), 3, priority=5)
    sim.submit(prompt_of(4, 2), 3, priority=1)
    assert [s.request_id for s in sim.scheduler.waiting] == ["r2", "r1"]
    sim.run()


def test_zero_tokens_scores_the_prompt() -> None:
    sim = Simulation()
    sim.submit(prompt_of(40), 0)
    sim.run()
    assert sim.outputs["r0", 0] == []
    assert sim.finished["r0", 0] is FinishReason.LENGTH


def test_abort_drops_a_pending_promise() -> None:
    sim = Simulation(max_tokens_per_batch=8)
    prefix = prompt_of(40)
    first = sim.submit(prefix, 1)
    sim.step()
    sim.submit([*prefix, 7], 1)
    assert sim.step().scheduled[0].seq.request_id == first
    sim.scheduler.abort(sim.sequences[0].group)
    sim.run()
    assert sim.outputs["r1", 0] == expected_output([*prefix, 7], 1)
