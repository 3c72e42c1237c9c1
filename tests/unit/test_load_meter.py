"""What a prompt that comes now would wait for."""

from __future__ import annotations

import pytest

from xllm.cache.block_hash import CacheRoot
from xllm.cache.block_pool import BlockPool
from xllm.cache.kv_cache import KVCache
from xllm.engine.load_meter import MAX_LOOKUPS, PERIOD_S, LoadMeter
from xllm.engine.request import Sequence
from xllm.engine.scheduler import Scheduler, SchedulerLimits
from xllm.engine.step_cost import StepCost, decode_work, prefill_work
from xllm.protocol import GenerateRequest, SamplingParams

BLOCK = 16
STEP_S, TOKEN_S, PAIR_S = 0.01, 1e-3, 1e-7


class Engine:
    def __init__(self) -> None:
        self.now = 100.0
        self.cost = StepCost()
        for i in range(400):
            work = prefill_work(i * 7 % 900, 1 + i * 13 % 500)
            seconds = STEP_S + TOKEN_S * work.rows + PAIR_S * work.prefill_pairs
            if i % 3 == 0:
                work += decode_work(100)
                seconds += TOKEN_S
            self.cost.observe(work, seconds)
        root = CacheRoot(fingerprint="f", kv_dtype="float32", block_size=BLOCK)
        limits = SchedulerLimits(max_tokens_per_batch=256, max_seqs_per_batch=4, max_model_len=4000)
        self.scheduler = Scheduler(KVCache(BlockPool(600), root), limits, (), self.cost)
        self.meter = LoadMeter(self.scheduler, self.cost, lambda: self.now)

    def submit(self, prompt: list[int]) -> Sequence:
        request = GenerateRequest(
            request_id="r", model_id="m", prompt_ids=prompt, sampling=SamplingParams()
        )
        seq = Sequence(request, 0, self.now)
        self.scheduler.add(seq)
        return seq

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.complete(plan, [5] * sum(item.num_samples for item in plan.scheduled))

    def queue_s(self) -> float:
        self.now += PERIOD_S
        return self.meter.queue_s()


def computing_s(start: int, num_tokens: int) -> float:
    pairs = num_tokens * (start + num_tokens / 2)
    return STEP_S + TOKEN_S * num_tokens + PAIR_S * pairs


def test_nothing_waits() -> None:
    assert Engine().queue_s() == 0.0


def test_waiting_prompts_add_up() -> None:
    engine = Engine()
    engine.submit([1] * 300)
    engine.submit([2] * 100)
    expected = computing_s(0, 300) + computing_s(0, 100)
    assert engine.queue_s() == pytest.approx(expected, rel=0.05)


def test_what_is_computed_is_not_waited_for_again() -> None:
    engine = Engine()
    engine.submit([1] * 600)
    engine.step()
    assert engine.queue_s() == pytest.approx(computing_s(256, 344), rel=0.05)


def test_what_is_cached_or_about_to_be_is_not_computed_again() -> None:
    engine = Engine()
    engine.submit([1] * 320)
    engine.submit([1] * 320 + [2] * 32)
    engine.step()
    # The first 256 tokens are there, the next 64 are being computed: the second prompt waits for
    # them and then has 32 of its own.
    expected = computing_s(256, 64) + computing_s(320, 32)
    assert engine.queue_s() == pytest.approx(expected, rel=0.05)


def test_decodes_slow_prompts_down() -> None:
    engine = Engine()
    engine.submit([1] * 64)
    engine.step()
    engine.submit([2] * 200)
    alone = computing_s(0, 200)
    assert engine.queue_s() > 1.1 * alone


def test_a_measurement_holds_for_a_while_but_an_empty_queue_is_seen_at_once() -> None:
    engine = Engine()
    seq = engine.submit([1] * 300)
    first = engine.queue_s()
    engine.submit([2] * 300)
    assert engine.meter.queue_s() == first
    assert engine.queue_s() > 1.9 * first
    engine.scheduler.abort_all()
    assert engine.meter.queue_s() == 0.0
    assert seq.finish_reason is not None


def test_of_prompts_beyond_the_limit_the_same_share_is_taken_to_be_cached() -> None:
    engine = Engine()
    shared = [1] * 3200
    engine.submit([*shared, 2])
    while engine.scheduler.has_work:
        engine.step()
    num_looked_for = MAX_LOOKUPS // 200
    for i in range(num_looked_for + 10):
        engine.submit([*shared, *([i] * 15)])
    expected = (num_looked_for + 10) * computing_s(3200, 15)
    assert engine.queue_s() == pytest.approx(expected, rel=0.1)
