import random

import pytest

from xllm.engine.step_cost import StepCost, StepWork, decode_work, prefill_work


def true_seconds(work: StepWork, speed: float = 1.0) -> float:
    seconds = 9e-3 + 7e-4 * work.rows + 9e-8 * work.prefill_pairs + 2e-7 * work.decode_pairs
    return seconds / speed


def random_work(rng: random.Random) -> StepWork:
    work = StepWork()
    for _ in range(rng.randrange(1, 9)):
        work += decode_work(rng.randrange(10, 4000))
    if rng.random() < 0.5:
        work += prefill_work(rng.randrange(0, 4000), rng.randrange(1, 500))
    return work


def learned(speed: float = 1.0, steps: int = 300, cost: StepCost | None = None) -> StepCost:
    rng = random.Random(1)
    cost = cost or StepCost()
    for _ in range(steps):
        work = random_work(rng)
        cost.observe(work, true_seconds(work, speed) * rng.uniform(0.95, 1.05))
    return cost


def test_prefill_work_counts_causal_pairs() -> None:
    assert prefill_work(0, 3).prefill_pairs == 1 + 2 + 3
    assert prefill_work(5, 2).prefill_pairs == 6 + 7
    assert prefill_work(0, 4) + prefill_work(4, 3) == prefill_work(0, 7)


def test_predictions_are_close_after_noisy_steps() -> None:
    cost = learned()
    rng = random.Random(2)
    for _ in range(50):
        work = random_work(rng)
        assert cost.predict(work) == pytest.approx(true_seconds(work), rel=0.1)


def test_it_follows_a_machine_that_slows_down() -> None:
    cost = learned(speed=0.5, steps=1000, cost=learned())
    work = decode_work(1000) + prefill_work(500, 200)
    assert cost.predict(work) == pytest.approx(true_seconds(work, 0.5), rel=0.1)


def test_one_kind_of_step_for_long_does_not_unlearn_the_others() -> None:
    cost = learned()
    for _ in range(20_000):
        cost.observe(decode_work(500), true_seconds(decode_work(500)))
    work = decode_work(500) + prefill_work(0, 300)
    assert cost.predict(work) == pytest.approx(true_seconds(work), rel=0.25)


@pytest.mark.parametrize("start", [0, 1000, 100_000])
def test_max_prefill_fills_the_budget(start: int) -> None:
    cost = learned()
    num_tokens = cost.max_prefill(0.08, start)
    added = cost.predict(prefill_work(start, num_tokens)) - cost.predict(StepWork())
    one_more = cost.predict(prefill_work(start, num_tokens + 1)) - cost.predict(StepWork())
    assert added <= 0.08 <= one_more * 1.001


def test_nothing_learned_limits_nothing() -> None:
    cost = StepCost()
    assert cost.predict(decode_work(5)) == 0
    assert cost.max_prefill(0.08, 0) > 1_000_000
    assert cost.prefill_tokens_per_s(100) == 0


def test_no_budget_no_tokens() -> None:
    assert learned().max_prefill(0.0, 0) == 0
    assert learned().max_prefill(-1.0, 0) == 0


def share_in_time(slow_share: float) -> float:
    """Of steps that were planned for 80 ms on a machine where some take half as long again."""
    rng = random.Random(3)
    cost = learned()
    num_in_time = 0
    for i in range(4000):
        work = decode_work(500)
        start = rng.randrange(0, 4000)
        left_s = cost.planned_s(0.08) - cost.predict(work)
        work += prefill_work(start, cost.max_prefill(left_s, start))
        seconds = true_seconds(work) * (1.5 if rng.random() < slow_share else 1.0)
        num_in_time += i >= 1000 and seconds <= 0.08
        cost.observe(work, seconds)
    return num_in_time / 3000


@pytest.mark.parametrize("slow_share", [0.0, 0.1, 0.3])
def test_nearly_all_steps_that_are_planned_are_in_time(slow_share: float) -> None:
    assert share_in_time(slow_share) > 0.9


def test_a_steady_machine_gets_its_time_back() -> None:
    cost = learned()
    for i in range(200):
        cost.observe(decode_work(500), true_seconds(decode_work(500)) * (1 + i % 2))
    assert cost.planned_s(0.08) < 0.07
    for _ in range(3000):
        cost.observe(decode_work(500), true_seconds(decode_work(500)))
    assert cost.planned_s(0.08) > 0.07
