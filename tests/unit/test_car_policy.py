"""Requests to routes: names of blocks, tenants, models, attempts."""

from __future__ import annotations

import json

import pytest
from msgspec import structs

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode, short_hashes
from xllm.cache.index import CacheIndex
from xllm.errors import ConfigError, Overloaded
from xllm.protocol import (
    Epoch,
    FetchRange,
    GenerateRequest,
    PrefillCost,
    SamplingParams,
    WorkerId,
    WorkerLoad,
)
from xllm.roles.car_policy import POLICY_NAMES, CostAware, make_router
from xllm.roles.cost_routing import Targets
from xllm.roles.global_scheduler import Candidate

A, B = WorkerId("a"), WorkerId("b")
ROOTS = {model: CacheRoot(f"weights of {model}", "float32", 4) for model in ("m", "n")}
TOKENS = list(range(40))
CANDIDATES = [Candidate(A, None, 0), Candidate(B, None, 0)]


def make_policy(*holders: WorkerId, salt: str = "") -> CostAware:
    """Policy over an index in which the holders have the tokens of model m."""
    index = CacheIndex()
    hashes = short_hashes(hash_blocks(ROOTS["m"].hash(salt), TOKENS, 4))
    for worker in holders:
        section = Section(TierCode.DEVICE, BlockEventKind.STORED, hashes)
        index.apply(worker, EventBatch((section,)))
    policy = CostAware(index, ROOTS.__getitem__, lambda: 0.0)
    load = WorkerLoad(epoch=Epoch(1), prefill_cost=PrefillCost(0.0, 1e-3, 0.0))
    for worker in (A, B):
        policy.report(ROOTS["m"], worker, load)
    return policy


def request(model_id: str = "m", salt: str = "", attempt: int = 0) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        model_id=model_id,
        prompt_ids=TOKENS,
        sampling=SamplingParams(),
        salt=salt,
        attempt=attempt,
    )


def held(policy: CostAware, asked: GenerateRequest) -> dict[str, int]:
    return {
        line["worker_id"]: line["prefix_blocks"]["device"]
        for line in policy.explain(asked, CANDIDATES)
    }


def test_a_prompt_goes_to_who_holds_its_blocks() -> None:
    for holder in (A, B):
        route = make_policy(holder).route(request(), CANDIDATES)
        assert route.worker_id == holder
        assert route.estimate.prefix == [10, 0, 0, 0]


def test_models_and_tenants_see_nothing_of_each_other() -> None:
    policy = make_policy(A, salt="tenant")
    assert held(policy, request(salt="tenant")) == {A: 10, B: 0}
    assert held(policy, request()) == {A: 0, B: 0}
    assert held(policy, request(salt="other")) == {A: 0, B: 0}
    assert held(policy, request("n", salt="tenant")) == {A: 0, B: 0}


def test_the_explanation_is_json_and_its_parts_add_up() -> None:
    policy = make_policy(A)
    for line in json.loads(json.dumps(policy.explain(request(), CANDIDATES))):
        waits_s = max(line["backlog_s"], line["loading_s"] + line["fetching_s"])
        assert abs(line["ttft_s"] - waits_s - line["computing_s"]) < 1e-5
        assert line["cost_s"] >= line["ttft_s"]


def test_a_second_attempt_is_a_dispatch_of_its_own_and_brings_its_output() -> None:
    policy = make_policy()
    first = policy.route(request(), CANDIDATES)
    policy.dispatched(first)
    policy.ended(first)
    second = policy.route(request(attempt=1), CANDIDATES)
    policy.dispatched(second)
    assert policy.first_token(first) is None
    outcome = policy.first_token(second)
    assert outcome is not None
    assert outcome.worker_id == second.worker_id
    longer = GenerateRequest(
        request_id="r2",
        model_id="m",
        prompt_ids=TOKENS[:20],
        output_ids=TOKENS[20:],
        sampling=SamplingParams(),
        attempt=1,
    )
    assert policy.route(longer, CANDIDATES).prompt.hashes == second.prompt.hashes


def test_a_prompt_shorter_than_a_block_is_routed_by_load() -> None:
    policy = make_policy(A)
    load = WorkerLoad(epoch=Epoch(1), prefill_cost=PrefillCost(0.0, 1e-3, 0.0), queue_s=1.0)
    policy.report(ROOTS["m"], A, load)
    short = GenerateRequest(request_id="s", model_id="m", prompt_ids=[1], sampling=SamplingParams())
    assert policy.route(short, CANDIDATES).worker_id == B


PEERS = {A: "a:1", B: "b:1"}


def router(name: str) -> CostAware:
    """Worker a has the prompt, and both can fetch quickly."""
    policy = make_policy(A)
    made = make_router(name, policy._index, ROOTS.__getitem__, lambda: 0.0, Targets(0.5, 0.1))
    load = WorkerLoad(
        epoch=Epoch(1), prefill_cost=PrefillCost(0.0, 1e-3, 0.0), tier_block_s={"peer": 1e-5}
    )
    for worker in (A, B):
        made.report(ROOTS["m"], worker, load)
    return made


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_chooses_a_candidate_and_explains_the_same_one(name: str) -> None:
    made = router(name)
    for _ in range(4):
        explained = made.explain(request(), CANDIDATES)
        assert sorted(line["worker_id"] for line in explained) == [A, B]
        assert explained == made.explain(request(), CANDIDATES)
        assert made.route(request(), CANDIDATES).worker_id == explained[0]["worker_id"]


def test_a_worker_that_was_chosen_by_turns_fetches_too() -> None:
    made = router("RR")
    assert made.route(request(), CANDIDATES, PEERS).fetch == ()
    second = made.route(request(), CANDIDATES, PEERS)
    assert (second.worker_id, second.fetch) == (B, (FetchRange(A, "a:1", 0, 10),))


def test_who_wants_scores_of_the_prompt_finds_nothing_cached() -> None:
    scored = structs.replace(request(), sampling=SamplingParams(prompt_logprobs=1))
    assert held(make_policy(A), scored) == {A: 0, B: 0}


def test_targets_refuse_new_requests_that_are_not_urgent() -> None:
    made = router("SLO_AWARE")
    load = WorkerLoad(epoch=Epoch(1), prefill_cost=PrefillCost(0.0, 1e-3, 0.0), queue_s=2.2)
    for worker in (A, B):
        made.report(ROOTS["m"], worker, load)
    with pytest.raises(Overloaded, match=r"2\.2 s.*--target_ttft is 0\.5 s") as refused:
        made.route(request(), CANDIDATES)
    assert refused.value.retry_after_s == 2
    assert not any(line["in_time"] for line in made.explain(request(), CANDIDATES))
    for goes_on in (request(attempt=1), structs.replace(request(), priority=-1)):
        assert made.route(goes_on, CANDIDATES).worker_id in (A, B)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="CAR, RR, LEAST_LOAD, SLO_AWARE"):
        make_router("RANDOM", CacheIndex(), ROOTS.__getitem__, lambda: 0.0, Targets(1.0, 1.0))
