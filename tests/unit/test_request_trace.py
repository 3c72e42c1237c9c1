"""Which spans a request has, as far as it came."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.cache.loads import LoadSpan
from xllm.cache.tier import TierName
from xllm.engine.request_trace import end_trace
from xllm.engine.timeline import Timeline
from xllm.tracing import Attribute


class Drawn:
    """A span that remembers what it was told."""

    traceparent = ""

    def __init__(self) -> None:
        self.children: list[tuple[str, float, float]] = []
        self.attributes: dict[str, Attribute] = {}
        self.ended: tuple[float | None, str] | None = None

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self.attributes |= attributes

    def record(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        self.children.append((name, start, end))

    def end(self, at: float | None = None, error: str = "") -> None:
        self.ended = (at, error)


def draw(timeline: Timeline, error: str = "") -> Drawn:
    span = Drawn()
    end_trace(span, timeline, error)
    assert span.ended == (timeline.ended_at, error)
    return span


def test_a_whole_request() -> None:
    loads = [LoadSpan(TierName.HOST, 1.0, 2.0, 3), LoadSpan(TierName.DISK, 1.0, 4.0, 5)]
    cached = {TierName.HOST: 96, TierName.DISK: 160}
    span = draw(Timeline(0.0, 5.0, 7.0, 9.0, loads, cached, 300, 3))
    assert span.children == [
        ("queue", 0.0, 1.0),
        ("load host", 1.0, 2.0),
        ("load disk", 1.0, 4.0),
        ("prefill", 5.0, 7.0),
        ("decode", 7.0, 9.0),
    ]
    assert span.attributes == {
        "gen_ai.usage.input_tokens": 300,
        "gen_ai.usage.output_tokens": 3,
        "xllm.cached_tokens.host": 96,
        "xllm.cached_tokens.disk": 160,
    }


def test_one_that_was_preempted_and_loaded_what_it_had_computed() -> None:
    loads = [LoadSpan(TierName.HOST, 6.0, 7.0, 3), LoadSpan(TierName.DISK, 6.0, 6.5, 1)]
    timeline = Timeline(0.0, 2.0, 3.0, 9.0, [LoadSpan(TierName.HOST, 1.0, 1.5, 1), *loads])
    span = draw(timeline)
    assert [name for name, *_ in span.children] == [
        *("queue", "load host", "load host", "load disk", "prefill", "decode"),
    ]
    assert span.children[0] == ("queue", 0.0, 1.0)
    assert timeline.load_s == 1.5
    timeline.loads = loads
    assert draw(timeline).children[0] == ("queue", 0.0, 2.0)


def test_one_that_was_cancelled_while_it_waited() -> None:
    assert draw(Timeline(0.0, ended_at=2.0)).children == [("queue", 0.0, 2.0)]


def test_one_that_failed_in_its_prefill() -> None:
    span = draw(Timeline(0.0, begun_at=1.0, ended_at=3.0), "boom")
    assert span.children == [("queue", 0.0, 1.0), ("prefill", 1.0, 3.0)]
