"""What the live page shows of requests, without anything that runs them."""

from __future__ import annotations

from typing import Any

import orjson

from xllm.cache.block_hash import CacheRoot
from xllm.cache.index import CacheIndex
from xllm.errors import EngineFault, WorkerLost
from xllm.protocol import (
    FinishReason,
    GenerateRequest,
    PhaseSeconds,
    SamplingParams,
    TokenDelta,
    WorkerId,
)
from xllm.roles.car_policy import CostAware, CostRoute
from xllm.roles.global_scheduler import Candidate
from xllm.roles.journal import MAX_CANDIDATES, MOVING_S, Journal

ROOT = CacheRoot("weights", "float32", 32)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def request(request_id: str = "r", attempt: int = 0, n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        model_id="m",
        prompt_ids=list(range(70)),
        sampling=SamplingParams(),
        attempt=attempt,
        n=n,
    )


def shown(journal: Journal, since: int = 0) -> list[dict[str, Any]]:
    return [orjson.loads(entry.as_json(journal.clock())) for entry in journal.entries(since)]


def route(sent: GenerateRequest, *workers: str) -> CostRoute:
    router = CostAware(CacheIndex(), lambda model_id: ROOT, Clock())
    return router.route(sent, [Candidate(WorkerId(worker), None, 0) for worker in workers])


def delta(offset: int, *token_ids: int, index: int = 0, end: bool = False) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        attempt=0,
        index=index,
        offset=offset,
        token_ids=list(token_ids),
        finish_reason=FinishReason.LENGTH if end else None,
        cached_tokens_by_tier={} if offset else {"host": 64},
        phases=PhaseSeconds(0.1, 0.2, 0.3, 0.4) if end else None,
    )


def test_a_request_from_routing_to_its_last_token() -> None:
    clock = Clock()
    journal = Journal(clock, lambda: 5000.0)
    sent = request()
    chosen = route(sent, "a", "b")
    attempt = journal.sent(sent, chosen)
    [entry] = shown(journal)
    assert (entry["state"], entry["ttft_s"]) == ("running", None)
    clock.now += 0.5
    attempt.begin(delta(0, 1))
    clock.now += 1.0
    attempt.finish(delta(1, 2, 3, end=True))
    [entry] = shown(journal)
    assert entry["state"] == "done"
    assert (entry["started_at"], entry["prompt_tokens"]) == (5000.0, 70)
    assert (entry["ttft_s"], entry["seconds"]) == (0.5, 1.5)
    [tried] = entry["attempts"]
    assert tried["worker_id"] == chosen.worker_id
    assert tried["output_tokens"] == 3
    assert tried["cached_tokens_by_tier"] == {"host": 64}
    assert tried["phases"] == {"queue": 0.1, "load": 0.2, "prefill": 0.3, "decode": 0.4}
    assert tried["estimated_s"] == round(chosen.estimate.parts.ttft_s, 6)
    assert entry["candidates"][0]["worker_id"] == chosen.worker_id
    assert {one["worker_id"] for one in entry["candidates"]} == {"a", "b"}
    assert journal.take_ttfts() == [0.5]
    assert journal.take_ttfts() == []


def test_a_lost_request_is_seen_to_go_on_elsewhere() -> None:
    clock = Clock()
    journal = Journal(clock, clock)
    first = journal.sent(request(), route(request(), "a"))
    first.begin(delta(0, 1))
    first.fail(WorkerLost("the connection was closed"))
    assert shown(journal)[0]["state"] == "moving"
    again = request(attempt=1)
    journal.sent(again, route(again, "b"))
    [entry] = shown(journal)
    assert entry["state"] == "running"
    assert [(a["worker_id"], a["state"]) for a in entry["attempts"]] == [
        ("a", "lost"),
        ("b", "running"),
    ]
    assert entry["attempts"][0]["error"] == "the connection was closed"


def test_one_that_nobody_takes_over_has_failed() -> None:
    clock = Clock()
    journal = Journal(clock, clock)
    journal.sent(request(), route(request(), "a")).fail(WorkerLost("gone"))
    assert shown(journal)[0]["state"] == "moving"
    seen = journal.version
    clock.now += MOVING_S
    assert shown(journal, seen)[0]["state"] == "failed", "which nobody had to tell"
    assert shown(journal, journal.version) == []
    journal.sent(request("other"), route(request("other"), "a")).fail(EngineFault("NaN"))
    assert shown(journal)[-1]["state"] == "failed"


def test_an_end_is_not_undone_by_a_late_cancel() -> None:
    journal = Journal(Clock(), Clock())
    attempt = journal.sent(request(n=2), route(request(n=2), "a"))
    attempt.begin(delta(0, 1))
    attempt.finish(delta(0, 1, end=True))
    assert shown(journal)[0]["state"] == "running"
    attempt.finish(delta(0, 1, index=1, end=True))
    attempt.cancel()
    assert shown(journal)[0]["state"] == "done"
    other = journal.sent(request("other"), route(request("other"), "a"))
    other.cancel()
    assert shown(journal)[-1]["state"] == "cancelled"


def test_the_estimates_of_others_are_the_best_ones() -> None:
    journal = Journal(Clock(), Clock())
    names = [f"w{i}" for i in range(20)]
    chosen = route(request(), *names)
    journal.sent(request(), chosen)
    candidates = shown(journal)[0]["candidates"]
    assert len(candidates) == MAX_CANDIDATES
    assert candidates[0]["worker_id"] == chosen.worker_id
    assert len({one["worker_id"] for one in candidates}) == MAX_CANDIDATES


def test_only_what_has_changed_is_told_again_and_old_ones_go() -> None:
    journal = Journal(Clock(), Clock(), max_entries=2)
    attempts = [journal.sent(request(name), route(request(name), "a")) for name in "abc"]
    assert [entry["request_id"] for entry in shown(journal)] == ["b", "c"]
    seen = journal.version
    assert shown(journal, seen) == []
    attempts[1].cancel()
    assert [entry["request_id"] for entry in shown(journal, seen)] == ["b"]
    attempts[0].cancel()  # forgotten, which its end must not mind
    assert [entry["request_id"] for entry in shown(journal)] == ["b", "c"]
