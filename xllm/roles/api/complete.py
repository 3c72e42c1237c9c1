"""From a validated request to its answer: run it, turn deltas into text, send that.

Whole or streamed, the same `_Answer` follows the request; it also feeds the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson
from aiohttp import web

from xllm.errors import RequestError, WorkerLost
from xllm.protocol import TIER_NAMES, FinishReason, GenerateRequest, TokenDelta
from xllm.roles.api.errors import error_object
from xllm.roles.api.format import Format, Usage
from xllm.roles.api.generations import Generations
from xllm.roles.api.prompts import Prompt
from xllm.roles.api.sample import Part, Sample, TextOptions
from xllm.roles.api.sse import DONE, EventStream, event
from xllm.telemetry import Metrics
from xllm.tokenizer import Tokenizer
from xllm.tracing import NO_SPAN, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that was accepted: one entry of `requests` per prompt, choices in that order."""

    requests: Sequence[GenerateRequest]
    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    text_options: TextOptions
    echo: bool
    format: Format
    include_usage: bool
    received_at: float
    """`time.monotonic()` when the HTTP request came in."""
    take_output: Callable[[int], None] = lambda num_tokens: None
    """Is told of output tokens as they come."""
    span: Span = NO_SPAN
    """Of the HTTP request."""


async def respond_whole(job: Job, generations: Generations, metrics: Metrics) -> web.Response:
    """Raises: RequestError."""
    answer = _Answer(job, metrics)
    parts: list[list[Part]] = [[] for _ in answer.samples]
    while not answer.is_complete:
        for choice, part in answer.advance(await generations.take(), generations):
            parts[choice].append(part)
    answer.observe_end()
    body = job.format.response([_join(pieces) for pieces in parts], answer.usage)
    return web.Response(body=orjson.dumps(body), content_type="application/json")


async def respond_streamed(
    job: Job, generations: Generations, metrics: Metrics, request: web.Request
) -> web.StreamResponse:
    """Raises: RequestError before the first token; a later one is an event, without a `[DONE]`."""
    answer = _Answer(job, metrics)
    stream = EventStream(request)
    opening = b"".join(map(event, job.format.opening(len(answer.samples))))
    try:
        while not answer.is_complete:
            events = [
                event(chunk)
                for choice, part in answer.advance(await generations.take(), generations)
                for chunk in job.format.chunks(choice, part)
            ]
            if events or opening:
                await stream.send(opening + b"".join(events))
                opening = b""
    except RequestError as error:
        if stream.response is None:
            raise
        metrics.request_errors.labels(error.label).inc()
        await stream.send(event(error_object(error)))
        return await stream.close()
    answer.observe_end()
    ending = event(job.format.usage_chunk(answer.usage)) if job.include_usage else b""
    await stream.send(ending + DONE)
    return await stream.close()


class _Answer:
    """The samples of a job, numbered as the choices of its answer."""

    def __init__(self, job: Job, metrics: Metrics) -> None:
        self._job = job
        self._metrics = metrics
        self.samples: list[Sample] = []
        self._first: list[int] = []
        """Per request: the number of its first sample."""
        self._cached_tokens = [0] * len(job.requests)
        self._cached_by_tier: list[dict[str, int]] = [{} for _ in job.requests]
        for request, prompt in zip(job.requests, job.prompts, strict=True):
            self._first.append(len(self.samples))
            self.samples += [self._new_sample(prompt) for _ in range(request.n)]
        self._num_unfinished = len(self.samples)
        self._first_token_at: list[float | None] = [None] * len(self.samples)
        self._last_token_at: list[float | None] = [None] * len(self.samples)
        self._has_tokens = False

    @property
    def is_complete(self) -> bool:
        return not self._num_unfinished

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self._job.prompts),
            completion_tokens=sum(sample.num_tokens for sample in self.samples),
            cached_tokens=sum(self._cached_tokens),
            cached_tokens_by_tier={
                tier: sum(cached.get(tier, 0) for cached in self._cached_by_tier)
                for tier in TIER_NAMES
            },
        )

    def advance(
        self, deltas: Sequence[tuple[int, TokenDelta]], generations: Generations
    ) -> list[tuple[int, Part]]:
        """What each delta adds to its choice. Cancels a request whose samples all have their end:
        at a stop string the text ends, not the tokens.

        Raises: WorkerLost for a sample that was aborted, which nobody here asked for.
        """
        now = time.monotonic()
        if not self._has_tokens:
            self._has_tokens = True
            self._job.span.set({"xllm.ttft_s": now - self._job.received_at})
            self._metrics.time_to_first_token_seconds.observe(now - self._job.received_at)
        parts = []
        for number, delta in deltas:
            if delta.finish_reason is FinishReason.ABORT:
                raise WorkerLost("the worker gave up this request; try again")
            self._job.take_output(len(delta.token_ids))
            self._cached_tokens[number] = max(self._cached_tokens[number], delta.cached_tokens)
            if delta.cached_tokens_by_tier:
                self._cached_by_tier[number] = delta.cached_tokens_by_tier
            choice = self._first[number] + delta.index
            sample = self.samples[choice]
            if sample.finished:
                continue
            self._observe_gap(choice, now)
            part = sample.push(delta)
            if part.finish_reason is not None:
                self._num_unfinished -= 1
                self._metrics.request_success.labels(part.finish_reason).inc()
                if self._is_request_finished(number):
                    generations.cancel(number)
            if part:
                parts.append((choice, part))
        return parts

    def observe_end(self) -> None:
        metrics = self._metrics
        metrics.e2e_request_latency_seconds.observe(time.monotonic() - self._job.received_at)
        for prompt in self._job.prompts:
            metrics.request_prompt_tokens.observe(len(prompt.token_ids))
        for sample, first, last in zip(
            *(self.samples, self._first_token_at, self._last_token_at), strict=True
        ):
            metrics.request_generation_tokens.observe(sample.num_tokens)
            if first is not None and last is not None and sample.num_tokens > 1:
                tpot_s = (last - first) / (sample.num_tokens - 1)
                metrics.request_time_per_output_token_seconds.observe(tpot_s)
        usage = self.usage
        self._job.span.set(
            {
                "gen_ai.request.model": self._job.requests[0].model_id,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "xllm.cached_tokens": usage.cached_tokens,
            }
        )
        for tier, num_tokens in usage.cached_tokens_by_tier.items():
            metrics.request_cached_tokens.labels(tier).inc(num_tokens)
        for request in self._job.requests:
            metrics.request_params_n.observe(request.n)
            metrics.request_params_max_tokens.observe(request.sampling.max_tokens)

    def _new_sample(self, prompt: Prompt) -> Sample:
        job = self._job
        if not job.echo:
            return Sample(job.tokenizer, job.text_options)
        text = job.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        return Sample(job.tokenizer, job.text_options, echo_text=text, echo_ids=prompt.token_ids)

    def _is_request_finished(self, number: int) -> bool:
        first = self._first[number]
        samples = self.samples[first : first + self._job.requests[number].n]
        return all(sample.finished for sample in samples)

    def _observe_gap(self, choice: int, now: float) -> None:
        last, self._last_token_at[choice] = self._last_token_at[choice], now
        if last is None:
            self._first_token_at[choice] = now
        else:
            self._metrics.inter_token_latency_seconds.observe(now - last)


def _join(parts: Sequence[Part]) -> Part:
    return Part(
        text="".join([part.text for part in parts]),
        scores=[score for part in parts for score in part.scores],
        finish_reason=parts[-1].finish_reason,
    )
