"""A whole cluster of real processes around the real model, as its users see it."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import Etcd, Launcher, Master, Worker, ask, http_status, post_json, wait_until

from xllm.roles.cost_routing import CREDIT_S

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."

# float32: greedy answers must not depend on how requests are batched. Small steps: a quick start.
WORKER_FLAGS = (
    *("--dtype=float32", "--max_cache_size=512M", "--num_threads=1"),
    *("--max_tokens_per_batch=64", "--max_seqs_per_batch=16", "--enable_cache_upload=true"),
)


@dataclass
class Cluster:
    launcher: Launcher
    etcd: Etcd
    master: Master
    workers: list[Worker]
    client: openai.OpenAI


def metric(url: str, name: str) -> float:
    """One sample of an operator port, by its name with labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        text = response.read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"{name} is not in\n{text}"
    return float(found[1])


def wait_for_workers(master: Master, count: int) -> None:
    wait_until(
        lambda: metric(master.operator_url, 'xllm_workers{state="ready"}') == count,
        f"{count} ready workers",
        timeout_s=30,
    )


@pytest.fixture(scope="module")
def cluster(module_launcher: Launcher, default_model_folder: Path) -> Iterator[Cluster]:
    """etcd, one master, two workers."""
    etcd = module_launcher.etcd()
    workers = [module_launcher.worker(etcd, *WORKER_FLAGS, wait_ready=False) for _ in range(2)]
    master = module_launcher.master(etcd)
    wait_for_workers(master, 2)
    url = f"{master.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=60) as client:
        yield Cluster(module_launcher, etcd, master, workers, client)


def test_curl(cluster: Cluster) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
    }
    completed = subprocess.run(
        [
            *("curl", "-sS", f"{cluster.master.http_url}/v1/chat/completions"),
            *("-H", "Content-Type: application/json", "-d", json.dumps(body)),
        ],
        capture_output=True,
        check=True,
        timeout=60,
    )
    answer = json.loads(completed.stdout)
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_openai_client_streams(cluster: Cluster) -> None:
    stream = cluster.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == ANSWER
    assert len(texts) > 3, "more than one piece"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_models(cluster: Cluster) -> None:
    assert [model.id for model in cluster.client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        cluster.client.completions.create(model="other", prompt="x")


def workers_used(cluster: Cluster, count: int, animals: str) -> set[str]:
    """Who answers prompts that share nothing, until `count` have.

    Several at a time: alone, all of them may go to the worker that has measured itself as quicker.
    """
    completions = cluster.client.completions.with_raw_response

    def who_answers(number: int) -> str:
        answer = completions.create(model=MODEL, prompt=f"{number} {animals}. " * 12, max_tokens=8)
        return answer.headers["x-xllm-worker-id"]

    used: set[str] = set()
    with ThreadPoolExecutor(8) as clients:
        for first in range(0, 40, 8):
            used |= set(clients.map(who_answers, range(first, first + 8)))
            if len(used) == count:
                break
    return used


def test_prompts_that_share_nothing_spread(cluster: Cluster) -> None:
    assert workers_used(cluster, 2, "sheep") == {worker.worker_id for worker in cluster.workers}


def test_a_prompt_goes_to_the_worker_that_has_seen_it(cluster: Cluster) -> None:
    completions = cluster.client.completions.with_raw_response

    def explain(prompt: str, salt: str) -> dict[str, Any]:
        body = {"text": prompt, "cache_salt": salt}
        return post_json(f"{cluster.master.operator_url}/admin/route", body)

    for number in range(2):
        prompt, salt = f"Story {number} about a cat. " * 30, f"tenant {number}"
        assert all(
            sum(line["prefix_blocks"].values()) == 0 for line in explain(prompt, salt)["candidates"]
        )
        first = completions.create(
            model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt}
        )
        worker_id = first.headers["x-xllm-worker-id"]
        usage = first.parse().usage
        assert usage is not None
        num_blocks = usage.prompt_tokens // 32
        # Longer than a dispatched prompt counts as held: from here on, it is what the index says.
        time.sleep(CREDIT_S + 0.1)
        explained = explain(prompt, salt)
        assert explained["worker_id"] == worker_id
        assert [c["prefix_blocks"]["device"] for c in explained["candidates"]] == [num_blocks, 0]
        assert explained["candidates"][0]["ttft_s"] < explained["candidates"][1]["ttft_s"]
        other = explain(prompt, "another tenant")["candidates"]
        assert [c["prefix_blocks"]["device"] for c in other] == [0, 0]
        second = completions.create(
            model=MODEL, prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt}
        )
        assert second.headers["x-xllm-worker-id"] == worker_id
        again = second.parse().usage
        assert again is not None
        assert again.prompt_tokens_details is not None
        assert again.prompt_tokens_details.cached_tokens == num_blocks * 32
    assert metric(cluster.master.operator_url, "xllm_index_workers_without_events") == 0
    assert metric(cluster.master.operator_url, "xllm_index_gaps_total") == 0


def test_a_client_that_goes_away_frees_its_blocks(cluster: Cluster) -> None:
    stream = cluster.client.completions.create(
        model=MODEL,
        prompt="Count: one, two, three,",
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(stream)

    def in_use() -> float:
        return sum(
            metric(worker.operator_url, "xllm_kv_cache_usage_perc") for worker in cluster.workers
        )

    assert in_use() > 0
    stream.close()
    wait_until(lambda: in_use() == 0, "blocks are free", timeout_s=2)
    assert metric(cluster.master.operator_url, "xllm_client_disconnects_total") >= 1


def test_a_worker_that_does_not_fit_is_refused(cluster: Cluster) -> None:
    odd = cluster.launcher.worker(cluster.etcd, *WORKER_FLAGS, "--block_size=16", wait_ready=False)
    assert odd.wait(60) == 2
    assert "--block_size=32" in odd.log.splitlines()[-1]


def test_a_taken_port_is_named(cluster: Cluster) -> None:
    port = cluster.workers[0].port
    flags = {"master": "http_server_port", "worker": "port"}
    processes = {
        flag: cluster.launcher.xllm(
            f"--role={role}", f"--etcd_addr={cluster.etcd.address}", f"--{flag}={port}"
        )
        for role, flag in flags.items()
    }
    for flag, process in processes.items():
        assert process.wait(30) == 2
        assert f"--{flag}={port}" in process.log.splitlines()[-1]


def test_a_worker_leaves_while_it_serves_and_another_joins(cluster: Cluster) -> None:
    stayed, left = cluster.workers
    streams = [
        cluster.client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=4,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(2)
    ]
    for stream in streams:
        next(stream)
    assert left.stop() == 0
    for stream in streams:
        assert list(stream)[-1].choices[0].finish_reason == "length"
    wait_for_workers(cluster.master, 1)
    assert http_status(f"{cluster.master.http_url}/health") == 200
    for _ in range(3):
        assert ask(cluster.master.http_url, QUESTION) == ANSWER
    assert stayed.running
    joined = cluster.launcher.worker(cluster.etcd, *WORKER_FLAGS, "--worker_id=new")
    wait_for_workers(cluster.master, 2)
    assert workers_used(cluster, 2, "goats") == {stayed.worker_id, "new"}
    assert joined.stop() == 0


def test_stop_is_clean(cluster: Cluster) -> None:
    assert cluster.workers[0].stop() == 0
    wait_until(
        lambda: http_status(f"{cluster.master.http_url}/health") == 503,
        "a master without workers",
        timeout_s=5,
    )
    assert cluster.master.stop() == 0


def test_the_commands_of_the_xllm_page(launcher: Launcher, default_model_folder: Path) -> None:
    """Flags and ports of xLLM's page "Global Multi-Level KV Cache", on loopback; and whoever
    starts before etcd waits for it."""
    master = launcher.xllm(
        "--role=master",
        "--etcd_addr=127.0.0.1:10998",
        *("--http_server_port", "28888", "--rpc_server_port", "28889"),
        f"--tokenizer_path={default_model_folder}",
    )
    worker = launcher.xllm(
        "--role=worker",
        f"--model={default_model_folder}",
        "--etcd_addr=127.0.0.1:10998",
        "--enable_service_routing=true",
        "--enable_cache_upload=true",
        "--enable_disagg_pd=false",
        *WORKER_FLAGS,
    )
    master.wait_for_log("waiting for etcd")
    worker.wait_for_log("waiting for etcd")
    assert http_status("http://127.0.0.1:28888/health") == 503
    launcher.etcd(
        "--listen-peer-urls=http://127.0.0.1:10999",
        "--initial-advertise-peer-urls=http://127.0.0.1:10999",
        "--initial-cluster=default=http://127.0.0.1:10999",
        port=10998,
    )
    wait_until(
        lambda: http_status("http://127.0.0.1:28888/health") == 200, "the cluster", timeout_s=60
    )
    assert ask("http://127.0.0.1:28888", QUESTION) == ANSWER
    assert http_status("http://127.0.0.1:28889/metrics") == 200
    assert (worker.stop(), master.stop()) == (0, 0)


def test_two_commands_and_nothing_else(launcher: Launcher, default_model_folder: Path) -> None:
    """`xllm --role=master` and `xllm --role=worker`: embedded etcd, default model."""
    master = launcher.xllm("--role=master")
    worker = launcher.xllm("--role=worker", *WORKER_FLAGS)
    wait_until(
        lambda: http_status("http://127.0.0.1:8888/health") == 200, "the cluster", timeout_s=60
    )
    assert ask("http://127.0.0.1:8888", QUESTION) == ANSWER
    assert http_status("http://127.0.0.1:2379/health") == 200
    assert master.stop() == 0
    wait_until(
        lambda: http_status("http://127.0.0.1:2379/health") is None, "etcd's end", timeout_s=5
    )
    assert worker.running, "it waits for another etcd"
    assert worker.stop() == 0


def test_a_worker_alone_serves_the_public_api(
    launcher: Launcher, default_model_folder: Path
) -> None:
    worker = launcher.worker(
        None, *WORKER_FLAGS, "--enable_service_routing=false", wait_ready=False
    )
    wait_until(lambda: http_status(f"{worker.http_url}/health") == 503, "the API", timeout_s=30)
    wait_until(lambda: http_status(f"{worker.http_url}/health") == 200, "the model", timeout_s=60)
    assert ask(worker.http_url, QUESTION) == ANSWER
    url = f"{worker.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=60) as client:
        stream = client.completions.create(
            model=MODEL,
            prompt="Count:",
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        assert worker.stop() == 0, "within five seconds, though a client is being served"
