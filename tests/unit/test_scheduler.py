"""Scheduling under random load: every request gets the tokens that it would have had alone."""

import random

import pytest

from tests.simulation import BLOCK_SIZE, FakeTiers, Simulation, expected_output, prompt_of
from xllm.cache.store_tier import StoreQuestion
from xllm.cache.tier import TierName
from xllm.engine.request import SequenceState
from xllm.engine.scheduler import MIN_CHUNK_TOKENS
from xllm.engine.step_cost import StepCost, decode_work, prefill_work
from xllm.protocol import BlockHash, FinishReason

EOS = 0


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("failing", [None, 0.0, 0.5])
def test_random_load_gives_each_request_its_own_tokens(
    seed: int, chunked: bool, failing: float | None
) -> None:
    rng = random.Random(seed)
    tiers = None if failing is None else FakeTiers(seed, failing)
    sim = Simulation(num_blocks=30, enable_chunked_prefill=chunked, max_model_len=110, tiers=tiers)
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
    assert tiers is None or tiers.num_loads > 0
    sim.kv_cache.poll()
    sim.kv_cache.poll()
    sim.check()
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
    assert sim.sequences[-1].cached_tokens == {TierName.DEVICE: 15}


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


def evicted_prompt(sim: Simulation, length: int) -> list[int]:
    """A prompt that is in the lower tier only."""
    prompt = prompt_of(length)
    sim.submit(prompt, 1)
    sim.run()
    for seed in range(1, 6):
        sim.submit(prompt_of(60, seed), 1)
    sim.run()
    return prompt


def test_blocks_come_up_from_a_lower_tier() -> None:
    sim = Simulation(num_blocks=16, tiers=FakeTiers())
    prompt = evicted_prompt(sim, 22)
    before = sim.computed_tokens
    request_id = sim.submit(prompt, 3)
    sim.run()
    assert sim.outputs[request_id, 0] == expected_output(prompt, 3)
    assert sim.computed_tokens - before == 2 + 2
    assert sim.sequences[-1].cached_tokens == {TierName.DEVICE: 0, TierName.HOST: 20}


def test_a_prompt_that_is_all_below_runs_one_token() -> None:
    sim = Simulation(num_blocks=16, tiers=FakeTiers())
    prompt = evicted_prompt(sim, 20)
    sim.submit(prompt, 1)
    before = sim.computed_tokens
    sim.run()
    assert sim.computed_tokens - before == 1
    assert sim.sequences[-1].cached_tokens == {TierName.DEVICE: 0, TierName.HOST: 19}


def test_others_run_while_one_is_loading() -> None:
    sim = Simulation(num_blocks=24, tiers=FakeTiers())
    prompt = evicted_prompt(sim, 40)
    loading = sim.submit(prompt, 1)
    other = sim.submit(prompt_of(8, 99), 1)
    plan = sim.step()
    assert [item.seq.request_id for item in plan.scheduled] == [other]
    assert sim.sequences[-2].state is SequenceState.LOADING
    sim.run()
    assert (loading, 0) in sim.finished


def test_the_same_blocks_are_loaded_once() -> None:
    sim = Simulation(num_blocks=24, tiers=FakeTiers())
    prompt = evicted_prompt(sim, 40)
    for i in range(4):
        sim.submit([*prompt, i + 1], 1)
    sim.run()
    assert sim.tiers is not None
    assert sim.tiers.num_loads == 1


def test_abort_while_loading_leaves_nothing_behind() -> None:
    sim = Simulation(num_blocks=24, tiers=FakeTiers(seed=3, failing=1.0))
    prompt = evicted_prompt(sim, 40)
    for _ in range(20):
        sim.submit(prompt, 1)
        sim.scheduler.schedule()
        sim.scheduler.abort(sim.sequences[-1].group)
        sim.check()
    sim.kv_cache.poll()
    sim.kv_cache.poll()
    assert sim.kv_cache.pool.num_free == 24


class AskedTiers(FakeTiers):
    """Beside them a store, whose answers the test gives."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[StoreQuestion] = []
        self.now = 0.0

    def ask(self, hashes: list[BlockHash], block_compute_s: float | None = None) -> StoreQuestion:
        self.questions.append(StoreQuestion(0.25, lambda: self.now))
        return self.questions[-1]


def test_a_prompt_waits_until_the_store_has_said_what_it_has() -> None:
    tiers = AskedTiers()
    sim = Simulation(tiers=tiers)
    sim.submit(prompt_of(40), 2)
    assert sim.step().scheduled == []
    assert sim.step().scheduled == []
    (question,) = tiers.questions
    names = sim.kv_cache.name_prompt(prompt_of(40), "")
    tiers.stored[names[0]] = [tuple(prompt_of(40)[: i + 1]) for i in range(BLOCK_SIZE)]
    question.is_answered = True
    sim.run()
    assert tiers.num_loads == 1
    assert len(tiers.questions) == 1
    assert sim.outputs["r0", 0] == expected_output(prompt_of(40), 2)


def test_a_store_that_says_nothing_is_not_waited_for() -> None:
    tiers = AskedTiers()
    sim = Simulation(tiers=tiers)
    sim.submit(prompt_of(40), 2)
    assert sim.step().scheduled == []
    tiers.now = 0.25
    assert sim.step().num_tokens > 0
