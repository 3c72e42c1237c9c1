"""When a silent peer is suspect and when it is lost, on a clock of the test's own."""

from __future__ import annotations

import pytest

from xllm.roles.liveness import Health, Silence, StepWatch, judge


@pytest.mark.parametrize(
    ("silence_s", "health"),
    [(0.0, "alive"), (1.5, "alive"), (1.6, "suspect"), (3.0, "suspect"), (3.1, "lost")],
)
def test_health(silence_s: float, health: str) -> None:
    assert judge(silence_s, suspect_s=1.5, lost_s=3.0) is Health(health)


def test_silence_grows_until_something_is_heard() -> None:
    silence = Silence(0.5, 10.0)
    assert [silence.check(10 + 0.5 * i) for i in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]
    silence.heard(12.1)
    assert silence.check(12.5) == pytest.approx(0.4)


def test_time_in_which_this_process_stood_still_is_no_silence() -> None:
    silence = Silence(0.5, 0.0)
    silence.heard(0.4)
    assert silence.check(0.5) == pytest.approx(0.1)
    # Frozen for a minute: what was sent meanwhile has not been read yet.
    assert silence.check(61.0) == pytest.approx(0.6)
    assert silence.check(61.5) == pytest.approx(1.1), "but it has to come now"


def test_a_little_late_is_not_frozen() -> None:
    silence = Silence(0.5, 0.0)
    assert [silence.check(now) for now in (0.9, 1.8, 2.7)] == [0.9, 1.8, 2.7]


def test_an_engine_is_stuck_when_it_is_busy_and_makes_no_step() -> None:
    watch = StepWatch(0.0)
    watch.report(7, is_busy=False, now=1.0)
    watch.report(7, is_busy=False, now=9.0)
    assert watch.stalled_s(9.0) == 0.0
    watch.report(7, is_busy=True, now=9.5)
    watch.report(7, is_busy=True, now=12.0)
    assert watch.stalled_s(12.0) == 3.0
    watch.report(8, is_busy=True, now=12.5)
    assert watch.stalled_s(12.5) == 0.0
