"""What is passed on between processes, with and without OpenTelemetry."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config import TraceConfig
from xllm.errors import ConfigError
from xllm.tracing import (
    NO_SPAN,
    OFF,
    PACKED_BYTES,
    format_traceparent,
    make_tracer,
    pack,
    parse_traceparent,
    unpack,
    valid_traceparent,
)

PARENT = f"00-{'0af7651916cd43dd8448eb211c80319c'}-{'b7ad6b7169203331'}-01"


@given(
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, 255),
)
def test_a_context_comes_through_as_text_and_packed(
    trace_id: int, span_id: int, flags: int
) -> None:
    header = format_traceparent(trace_id, span_id, flags)
    assert parse_traceparent(header) == (trace_id, span_id, flags)
    assert len(pack(header)) == PACKED_BYTES
    assert unpack(pack(header)) == valid_traceparent(header) == header


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        PARENT.upper(),
        PARENT + "-00",
        PARENT[:-1],
        "ff" + PARENT[2:],
        f"00-{'0' * 32}-{'b7ad6b7169203331'}-01",
        f"00-{'0af7651916cd43dd8448eb211c80319c'}-{'0' * 16}-01",
    ],
)
def test_what_cannot_be_used_is_dropped(header: str | None) -> None:
    assert valid_traceparent(header) == ""


def test_zeros_from_another_process_are_no_context() -> None:
    assert unpack(bytes(PACKED_BYTES)) == ""


def test_off_passes_the_callers_context_on_and_does_nothing() -> None:
    assert make_tracer(TraceConfig(), "master", "m") is OFF
    span = OFF.start("request", PARENT)
    span.record("queue", 1.0, 2.0, {})
    span.set({"a": 1})
    span.end()
    assert span.traceparent == PARENT
    assert OFF.start("request") is NO_SPAN
    assert NO_SPAN.traceparent == ""


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xllm.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"xllm\[otel\]"):
        make_tracer(TraceConfig(otlp_endpoint="http://localhost:4318"), "master", "m")
