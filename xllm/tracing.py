"""Traces of requests: what the rest of xllm knows of OpenTelemetry.

Off, which is the default, nothing of OpenTelemetry is imported: `OFF` makes spans that only pass on
whose children they would be. `--otlp_endpoint` turns it on: `otlp.py`.

One trace per request, across processes. What travels is W3C's `traceparent`: in the client's HTTP
header, in `protocol.GenerateRequest`, and packed in a fetch of blocks between workers.

    client ──header──> POST /v1/...                              master
                         ├─ route                                once per attempt
                         └─ request                              worker, once per attempt
                              ├─ queue
                              ├─ load host, load disk, load remote
                              ├─ fetch blocks                    from a peer
                              │    └─ serve blocks               the peer
                              ├─ prefill
                              └─ decode

Times are of `time.monotonic`, so that spans can be drawn after the fact from what was noted anyway.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final, Protocol

from xllm.config import TraceConfig
from xllm.errors import ConfigError

PACKED_BYTES: Final = 25

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

Attribute = str | int | float | bool


class SpanKind(enum.Enum):
    INTERNAL = "internal"
    SERVER = "server"
    """The other side asked for it from another process."""
    CLIENT = "client"
    """It asks another process."""


class Span(Protocol):
    """Something that takes time; any thread may call it, one at a time."""

    @property
    def traceparent(self) -> str:
        """For children, in this process or another one; empty: of no trace."""
        ...

    def set(self, attributes: Mapping[str, Attribute]) -> None: ...

    def record(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        """A child that is over."""
        ...

    def end(self, at: float | None = None, error: str = "") -> None:
        """Idempotent. `at`: when; None: now. `error`: why it failed, if it did."""
        ...


class Tracer(Protocol):
    """Makes spans; any thread may call it."""

    @property
    def is_on(self) -> bool: ...

    def start(
        self,
        name: str,
        parent: str = "",
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        at: float | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        """`parent`: a `traceparent`; without one that can be read a trace begins. `at`: when; None:
        now."""
        ...

    def close(self, timeout_s: float = 1.0) -> None:
        """Sends what has ended, as far as there is time; blocks."""
        ...


class _PassedOn:
    """A span that is nobody's: its children are its parent's."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        pass

    def record(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        pass

    def end(self, at: float | None = None, error: str = "") -> None:
        pass


class _Off:
    is_on = False

    def start(
        self,
        name: str,
        parent: str = "",
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        at: float | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        return _PassedOn(parent) if parent else NO_SPAN

    def close(self, timeout_s: float = 1.0) -> None:
        pass


NO_SPAN: Final[Span] = _PassedOn("")
OFF: Final[Tracer] = _Off()


def make_tracer(config: TraceConfig, role: str, instance: str) -> Tracer:
    """For a process that is called `instance`. Raises: ConfigError."""
    if config.otlp_endpoint is None:
        return OFF
    try:
        from xllm.otlp import OtlpTracer
    except ImportError as error:
        raise ConfigError(
            f"--otlp_endpoint={config.otlp_endpoint}: needs OpenTelemetry ({error}); "
            "pip install 'xllm[otel]'"
        ) from error
    return OtlpTracer(config.otlp_endpoint, role, instance)


def parse_traceparent(header: str) -> tuple[int, int, int] | None:
    """-> trace id, span id, flags; None: it says nothing that can be used."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return (trace_id, span_id, flags) if trace_id and span_id else None


def valid_traceparent(header: str | None) -> str:
    """The header as it came, or nothing: a client may have sent anything."""
    return header if header and parse_traceparent(header) else ""


def format_traceparent(trace_id: int, span_id: int, flags: int) -> str:
    return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"


def pack(traceparent: str) -> bytes:
    """PACKED_BYTES of a valid traceparent."""
    return bytes.fromhex(traceparent[3:].replace("-", ""))


def unpack(packed: bytes) -> str:
    """Of PACKED_BYTES from another process; empty: they say nothing that can be used."""
    trace_id, span_id, flags = packed[:16].hex(), packed[16:24].hex(), packed[24:].hex()
    return valid_traceparent(f"00-{trace_id}-{span_id}-{flags}")
