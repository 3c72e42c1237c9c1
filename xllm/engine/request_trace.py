"""The spans of one request on a worker, drawn at its end from what the engine noted. Pure."""

from __future__ import annotations

from xllm.engine.timeline import Timeline
from xllm.protocol import GenerateRequest
from xllm.tracing import Span, SpanKind, Tracer


def start_trace(tracer: Tracer, request: GenerateRequest, timeline: Timeline) -> Span:
    """The span that all others of the request here belong to."""
    return tracer.start(
        "request",
        request.traceparent,
        kind=SpanKind.SERVER,
        at=timeline.submitted_at,
        attributes={
            "gen_ai.request.model": request.model_id,
            "xllm.request_id": request.request_id,
            "xllm.attempt": request.attempt,
            "xllm.num_samples": request.n,
        },
    )


def end_trace(span: Span, timeline: Timeline, error: str) -> None:
    """Draws what came of it; `error`: why it failed, if it did."""
    assert timeline.ended_at is not None
    waited_until = min((load.started_at for load in timeline.loads), default=timeline.begun_at)
    end = timeline.ended_at if waited_until is None else waited_until
    span.record("queue", timeline.submitted_at, end, {})
    for load in timeline.loads:
        attributes = {"xllm.tier": load.tier.value, "xllm.num_blocks": load.num_blocks}
        span.record(f"load {load.tier.value}", load.started_at, load.ended_at, attributes)
    if timeline.begun_at is not None:
        end = timeline.first_token_at or timeline.ended_at
        num_cached = sum(timeline.cached_tokens.values())
        num_computed = timeline.num_prompt_tokens - num_cached
        span.record("prefill", timeline.begun_at, end, {"xllm.computed_tokens": num_computed})
    if timeline.first_token_at is not None:
        span.record("decode", timeline.first_token_at, timeline.ended_at, {})
    span.set(
        {
            "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
            "gen_ai.usage.output_tokens": timeline.num_output_tokens,
            **{f"xllm.cached_tokens.{t.value}": n for t, n in timeline.cached_tokens.items()},
        }
    )
    span.end(timeline.ended_at, error)
