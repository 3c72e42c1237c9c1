"""Forms and forced calls with the real model in a real cluster, one of whose workers dies."""

from __future__ import annotations

import asyncio
import json
import signal

import jsonschema
import openai
import pytest
from processes import Launcher, Master, Worker

from tests.structured import Tally, ask_for_answers

MODEL = "SmolLM2-135M-Instruct"
WORKER_FLAGS = ("--max_cache_size=512M", "--num_threads=1", "--max_tokens_per_batch=64")
NUM_ANSWERS = 32
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
}


@pytest.fixture(scope="module")
def cluster(module_launcher: Launcher, default_model_folder: object) -> tuple[Master, list[Worker]]:
    etcd = module_launcher.etcd()
    workers = [module_launcher.worker(etcd, *WORKER_FLAGS, wait_ready=False) for _ in range(2)]
    master = module_launcher.master(etcd, "--load_balance_policy=RR", wait_ready=True)
    for worker in workers:
        worker.wait_for_log("worker_ready")
    return master, workers


def test_a_forced_call_follows_its_schema(cluster: tuple[Master, list[Worker]]) -> None:
    master, _ = cluster
    with (
        openai.OpenAI(base_url=f"{master.http_url}/v1", api_key="none", timeout=60) as client,
        client.chat.completions.stream(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=[{"type": "function", "function": {"name": "get_weather", "parameters": PLACE}}],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=400,
            temperature=1.0,
            seed=1,
        ) as stream,
    ):
        [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), PLACE)


def test_answers_that_move_to_another_worker_stay_valid(
    cluster: tuple[Master, list[Worker]],
) -> None:
    master, workers = cluster

    def kill_one(tally: Tally) -> None:
        if tally.num_valid + len(tally.wrong) == NUM_ANSWERS // 4:
            workers[0].send(signal.SIGKILL)

    tally = asyncio.run(
        ask_for_answers(master.http_url, MODEL, NUM_ANSWERS, concurrency=16, on_answer=kill_one)
    )
    assert tally.wrong == []
    assert tally.num_valid == NUM_ANSWERS
    assert not workers[0].running
    assert "request_moves" in master.log
