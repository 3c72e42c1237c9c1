"""Traces by OpenTelemetry's SDK, sent by OTLP over HTTP. Imported only where traces are on.

The SDK decides what is sampled (`OTEL_TRACES_SAMPLER`; by default what the caller decided, or all)
and sends from a thread of its own; a collector that is away costs lost spans and a line in the log.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from xllm import __version__
from xllm.tracing import Attribute, Span, SpanKind, format_traceparent, parse_traceparent

_KINDS = {
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.CLIENT: trace.SpanKind.CLIENT,
}


class OtlpTracer:
    """A `Tracer` that sends to `endpoint`, the base URL of a collector: http://host:4318."""

    is_on = True

    def __init__(self, endpoint: str, role: str, instance: str) -> None:
        attributes = {
            "service.instance.id": instance,
            "service.version": __version__,
            "xllm.role": role,
        }
        if "OTEL_SERVICE_NAME" not in os.environ:
            attributes["service.name"] = f"xllm-{role}"
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider = TracerProvider(
            resource=Resource.create(attributes), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("xllm", __version__)

    def start(
        self,
        name: str,
        parent: str = "",
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        at: float | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        context = None
        if found := parse_traceparent(parent):
            trace_id, span_id, flags = found
            remote = trace.SpanContext(trace_id, span_id, True, trace.TraceFlags(flags))
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        # The wall clock of all that belongs to the span: it may be set while the span lasts.
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            context=context or trace.set_span_in_context(trace.INVALID_SPAN),
            kind=_KINDS[kind],
            attributes=attributes,
            start_time=_wall_ns(at, offset_ns),
        )
        return _OtlpSpan(self._tracer, span, offset_ns)

    def close(self, timeout_s: float = 1.0) -> None:
        # A collector that does not answer must not keep the process.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(timeout_s)


class _OtlpSpan:
    __slots__ = ("_has_ended", "_offset_ns", "_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span, offset_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._offset_ns = offset_ns
        self._has_ended = False

    @property
    def traceparent(self) -> str:
        context = self._span.get_span_context()
        return format_traceparent(context.trace_id, context.span_id, context.trace_flags)

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(attributes)

    def record(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        child = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(self._span),
            attributes=attributes,
            start_time=_wall_ns(start, self._offset_ns),
        )
        child.end(_wall_ns(end, self._offset_ns))

    def end(self, at: float | None = None, error: str = "") -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if error:
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        self._span.end(_wall_ns(at, self._offset_ns))


def _wall_ns(at: float | None, offset_ns: int) -> int:
    monotonic_ns = time.monotonic_ns() if at is None else round(at * 1e9)
    return monotonic_ns + offset_ns
