from __future__ import annotations

from xllm.cache.loads import LoadSpan
from xllm.cache.tier import TierName
from xllm.engine.timeline import Timeline


def test_loading_is_no_waiting() -> None:
    timeline = Timeline(10.0, begun_at=11.0, first_token_at=13.0)
    timeline.loads.append(LoadSpan(TierName.HOST, 10.25, 10.5, 3))
    timeline.loads.append(LoadSpan(TierName.DISK, 10.25, 10.75, 1))
    phases = timeline.phases(17.0)
    assert (phases.queue, phases.load, phases.prefill, phases.decode) == (0.5, 0.5, 2.0, 4.0)


def test_phases_are_never_negative() -> None:
    late = Timeline(10.0, begun_at=10.5, first_token_at=11.0)
    late.loads.append(LoadSpan(TierName.DISK, 10.25, 12.0, 1))  # not waited for to its end
    phases = late.phases(11.0)
    assert (phases.queue, phases.load, phases.prefill) == (0.0, 0.5, 0.5)
    assert phases.decode == 0.0
