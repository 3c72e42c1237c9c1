"""Sends sessions at their times, whatever comes back, and measures what clients see.

Times count from when a request was due, not from when it could be sent: a generator that waits for
answers would not see the queue that it leaves out.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import orjson

from benchmarks.workloads import Session

TTFT_LIMIT_S = 2.0
TBT_LIMIT_S = 0.1
TIMEOUT_S = 300.0


@dataclass(slots=True)
class Record:
    """One request, in seconds since the start."""

    due_s: float
    status: int = 0
    """Of HTTP; 0: no answer."""
    worker_id: str = ""
    token_times: list[float] = field(default_factory=list)
    """One per event with text: tokens of one step come together."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    text: str = ""

    @property
    def is_answered(self) -> bool:
        return self.status == 200 and bool(self.output_tokens)

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        return (self.token_times[-1] - self.token_times[0]) / max(self.output_tokens - 1, 1)

    @property
    def is_good(self) -> bool:
        gaps = [after - before for before, after in pairwise(self.token_times)]
        return self.ttft_s < TTFT_LIMIT_S and max(gaps, default=0.0) < TBT_LIMIT_S


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the requests that were due in the measured part of a run."""

    name: str
    rate: float
    """Requests per second that were due."""
    num_requests: int
    num_failed: int
    ttft_s: dict[float, float]
    """By quantile; of no answers, empty."""
    tpot_s: dict[float, float]
    hit_rate: float
    """Prompt tokens that were not computed."""
    hit_rate_by_tier: dict[str, float]
    requests_per_s: float
    """Answered."""
    output_tokens_per_s: float
    goodput_per_s: float
    """Requests with a TTFT below 2 s and no gap of 100 ms."""


async def run_open_loop(url: str, sessions: Sequence[Session], model: str | None) -> list[Record]:
    """Returns when every session has ended."""
    records: list[Record] = []
    start = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as http,
        asyncio.TaskGroup() as tasks,
    ):
        for session in sorted(sessions, key=lambda session: session.start_s):
            await asyncio.sleep(max(0.0, session.start_s - (time.perf_counter() - start)))
            tasks.create_task(_converse(http, url, session, model, start, records))
    return records


async def run_closed_loop(
    url: str, sessions: Sequence[Session], model: str | None, concurrency: int, duration_s: float
) -> list[Record]:
    """So many clients that each send the next request when the last is answered: what a cluster
    can do."""
    records: list[Record] = []
    left = iter(sessions)
    start = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)

    async def client() -> None:
        for session in left:
            now = time.perf_counter() - start
            if now > duration_s:
                return
            await _ask(http, url, session, 0, [], model, start, Record(now), records)

    async with aiohttp.ClientSession(timeout=timeout) as http, asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(client())
    return records


async def _converse(
    http: aiohttp.ClientSession,
    url: str,
    session: Session,
    model: str | None,
    start: float,
    records: list[Record],
) -> None:
    answers: list[str] = []
    due_s = session.start_s
    for turn in range(session.num_turns):
        record = Record(due_s)
        await _ask(http, url, session, turn, answers, model, start, record, records)
        if not record.is_answered:
            return
        answers.append(record.text)
        await asyncio.sleep(session.think_s)
        due_s = time.perf_counter() - start


async def _ask(
    http: aiohttp.ClientSession,
    url: str,
    session: Session,
    turn: int,
    answers: Sequence[str],
    model: str | None,
    start: float,
    record: Record,
    records: list[Record],
) -> None:
    records.append(record)
    body = {
        **session.body(turn, answers),
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model is not None:
        body["model"] = model
    try:
        async with http.post(f"{url}/v1/{session.path}", json=body) as response:
            record.status = response.status
            record.worker_id = response.headers.get("x-xllm-worker-id", "")
            if response.status != 200:
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(record, orjson.loads(line[6:]), time.perf_counter() - start)
    except (aiohttp.ClientError, TimeoutError):
        record.status = 0


def _take(record: Record, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        record.status = 500
    for choice in event.get("choices", ()):
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        record.text += text
        if text or choice.get("finish_reason"):
            record.token_times.append(now)
    usage = event.get("usage")
    if usage:
        record.prompt_tokens = usage["prompt_tokens"]
        record.output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        by_tier = details.get("cached_tokens_by_tier")
        record.cached_by_tier = by_tier or {"any": details.get("cached_tokens") or 0}


def summarize(name: str, records: Sequence[Record], warm_s: float) -> Summary:
    """Of what was due after `warm_s`."""
    due = [record for record in records if record.due_s >= warm_s]
    answered = [record for record in due if record.is_answered]
    ends = [record.token_times[-1] for record in answered]
    due_span = max((record.due_s for record in due), default=warm_s) - warm_s
    span = max(max(ends, default=warm_s) - warm_s, due_span, 1e-9)
    prompt_tokens = sum(record.prompt_tokens for record in answered) or 1
    cached: Counter[str] = Counter()
    for record in answered:
        cached.update(record.cached_by_tier)
    return Summary(
        name=name,
        rate=len(due) / max(due_span, 1e-9),
        num_requests=len(due),
        num_failed=len(due) - len(answered),
        ttft_s=_quantiles([record.ttft_s for record in answered]),
        tpot_s=_quantiles([record.tpot_s for record in answered]),
        hit_rate=cached.total() / prompt_tokens,
        hit_rate_by_tier={tier: count / prompt_tokens for tier, count in cached.items()},
        requests_per_s=len(answered) / span,
        output_tokens_per_s=sum(record.output_tokens for record in answered) / span,
        goodput_per_s=sum(record.is_good for record in answered) / span,
    )


def _quantiles(values: Sequence[float]) -> dict[float, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {q: ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.5, 0.9, 0.99)}
