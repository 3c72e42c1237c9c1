"""Requests to routes: names of blocks, tenants, models, attempts."""

from __future__ import annotations

import json

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.cache.block_pool import BlockEventKind
from xllm.cache.event_codec import EventBatch, Section, TierCode, short_hashes
from xllm.cache.index import CacheIndex
from xllm.protocol import Epoch, GenerateRequest, PrefillCost, SamplingParams, WorkerId, WorkerLoad
from xllm.roles.car_policy import CostAware
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
