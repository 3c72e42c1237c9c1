"""Policies: who gets the next request."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.protocol import Epoch, GenerateRequest, SamplingParams, WorkerId, WorkerLoad
from xllm.roles.global_scheduler import POLICIES, Candidate, LeastLoad, RoundRobin


def make_request(model_id: str = "m") -> GenerateRequest:
    return GenerateRequest(
        request_id="r", model_id=model_id, prompt_ids=[1], sampling=SamplingParams()
    )


def candidate(name: str, waiting: int = 0, running: int = 0, unreported: int = 0) -> Candidate:
    load = WorkerLoad(epoch=Epoch(1), waiting_requests_num=waiting, running_requests_num=running)
    return Candidate(WorkerId(name), load, unreported)


def test_round_robin_gives_each_its_turn() -> None:
    policy = RoundRobin()
    workers = [candidate(name) for name in "abc"]
    routed = [policy.route(make_request(), workers).worker_id for _ in range(6)]
    assert routed == list("abcabc")


def test_round_robin_goes_on_after_the_last_one_though_it_left() -> None:
    policy = RoundRobin()
    workers = {name: candidate(name) for name in "abcd"}
    assert policy.route(make_request(), list(workers.values())).worker_id == "a"
    assert policy.route(make_request(), list(workers.values())).worker_id == "b"
    del workers["b"]
    assert policy.route(make_request(), list(workers.values())).worker_id == "c"


def test_round_robin_counts_models_apart() -> None:
    policy = RoundRobin()
    workers = [candidate("a"), candidate("b")]
    assert policy.route(make_request("one"), workers).worker_id == "a"
    assert policy.route(make_request("two"), workers).worker_id == "a"
    assert policy.route(make_request("one"), workers).worker_id == "b"


def test_least_load_counts_waiting_running_and_what_was_not_reported() -> None:
    workers = [
        candidate("a", waiting=2, running=1),
        candidate("b", running=4, unreported=-2),
        candidate("c", running=1, unreported=3),
    ]
    assert LeastLoad().route(make_request(), workers).worker_id == "b"


def test_least_load_takes_turns_among_equals() -> None:
    policy = LeastLoad()
    workers = [candidate("a"), candidate("b"), candidate("c", running=1)]
    routed = [policy.route(make_request(), workers).worker_id for _ in range(4)]
    assert routed == list("abab")


def test_a_worker_that_has_not_reported_counts_with_what_was_sent_there() -> None:
    workers = [candidate("a", running=1), Candidate(WorkerId("b"), None, 2)]
    assert LeastLoad().route(make_request(), workers).worker_id == "a"


def test_a_report_older_than_the_ends_seen_since_is_not_below_nothing() -> None:
    assert candidate("a", running=1, unreported=-5).num_requests == 0


@given(
    loads=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    num_requests=st.integers(0, 50),
)
def test_own_dispatches_level_the_load_before_any_report_comes(
    loads: list[int], num_requests: int
) -> None:
    policy = LeastLoad()
    sent: Counter[str] = Counter()
    for _ in range(num_requests):
        workers = [
            candidate(f"w{i}", running=load, unreported=sent[f"w{i}"])
            for i, load in enumerate(loads)
        ]
        sent[policy.route(make_request(), workers).worker_id] += 1
    ends = [load + sent[f"w{i}"] for i, load in enumerate(loads)]
    used = [end for i, end in enumerate(ends) if sent[f"w{i}"]]
    assert not used or max(used) - min(ends) <= 1


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_look_ahead_changes_nothing(name: str) -> None:
    workers = [candidate("a"), candidate("b"), candidate("c", running=3)]
    policy = POLICIES[name]()
    for _ in range(5):
        ahead = [policy.peek(make_request(), workers) for _ in range(2)]
        assert ahead == [policy.route(make_request(), workers)] * 2
