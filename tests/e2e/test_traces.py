"""One trace per request, across a master, two workers, their tiers and a fetch between them."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
from otlp_collector import Collector, Span, collector
from processes import Launcher, Master, Worker, post_json, wait_until

from tests.chaos.model import MODEL_ID, write_chaos_model

BLOCK = 32
NUM_BLOCKS = 12
PROMPTS = [
    random.Random(seed).choices(range(1000, 20000), k=NUM_BLOCKS * BLOCK + 5) for seed in range(5)
]
"""More than one, because on a machine that is too busy a fetch may be given up."""
PATH = "/v1/completions"
ROOT = f"POST {PATH}"
WAIT_S = 60.0


@dataclass
class Rig:
    collector: Collector
    master: Master
    workers: list[Worker]

    def ask(self, trace_id: str, prompt: list[int], flags: str = "01", max_tokens: int = 4) -> str:
        """Sends the prompt as part of a client's trace; who has answered."""
        body = {
            "model": MODEL_ID,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
        headers = {
            "Content-Type": "application/json",
            "traceparent": f"00-{trace_id}-{'c' * 16}-{flags}",
        }
        url = f"{self.master.http_url}{PATH}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            answer.read()
            return str(answer.headers["x-xllm-worker-id"])

    def tree(self, trace_id: str, *names: str) -> dict[str, Span]:
        """The trace's spans by name, once all of these have come."""

        def has_come() -> bool:
            return {span.name for span in self.collector.spans(trace_id)} >= set(names)

        wait_until(has_come, f"spans {names}", WAIT_S)
        spans = self.collector.spans(trace_id)
        assert sorted(span.name for span in spans) == sorted(names)
        return {span.name: span for span in spans}

    def fetch(self, trace_id: str) -> Span | None:
        """The trace's fetch, once the request has ended."""

        def has_ended() -> bool:
            names = {span.name for span in self.collector.spans(trace_id)}
            return names >= {ROOT, "request"}

        wait_until(has_ended, "the end of the trace", WAIT_S)
        spans = self.collector.spans(trace_id)
        return next((span for span in spans if span.name == "fetch blocks"), None)

    def until_indexed(self, holder: str, prompt: list[int]) -> None:
        """The master has been told that this worker has the prompt: so it can be fetched."""

        def is_indexed() -> bool:
            url = f"{self.master.operator_url}/admin/cache/lookup"
            found = post_json(url, {"token_ids": prompt, "model": MODEL_ID})["workers"][holder]
            return sum(found["indexed_tokens_by_tier"].values()) == NUM_BLOCKS * BLOCK

        wait_until(is_indexed, f"an index of what {holder} holds", WAIT_S)

    def worker(self, worker_id: str) -> Worker:
        (worker,) = [w for w in self.workers if w.worker_id == worker_id]
        return worker


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    model = write_chaos_model(tmp_path_factory.mktemp("model"))
    with (
        collector() as collecting,
        processes.launcher(tmp_path_factory.mktemp("processes")) as launcher,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield _start(launcher, collecting, model)


def _start(launcher: Launcher, collecting: Collector, model: Path) -> Rig:
    etcd = launcher.etcd()
    traced = f"--otlp_endpoint={collecting.url}"
    workers = [
        launcher.worker(
            etcd,
            *(f"--model={model}", f"--model_id={MODEL_ID}", "--dtype=float32", "--num_threads=1"),
            *("--max_cache_size=16MiB", "--host_cache_size=16MiB", "--enable_cache_upload=true"),
            # Whatever computing would take: this is about what is seen of a load.
            *("--prefetch_timeout=60000", traced),
            wait_ready=False,
        )
        for _ in range(2)
    ]
    for worker in workers:
        launcher.wait_healthy(worker, f"{worker.operator_url}/health")
    master = launcher.master(etcd, "--load_balance_policy=RR", traced, wait_ready=True)

    def sees_both() -> bool:
        with urllib.request.urlopen(f"{master.operator_url}/admin/cluster") as answer:
            return [w["state"] for w in json.load(answer)["workers"]] == ["ready"] * 2

    wait_until(sees_both, "the master to reach both workers", WAIT_S)
    return Rig(collecting, master, workers)


def _check_nested(spans: dict[str, Span], root: str = ROOT) -> None:
    """Each span lies within its parent, as far as one clock can tell."""
    by_id = {span.span_id: span for span in spans.values()}
    for span in spans.values():
        assert span.start_ns <= span.end_ns
        parent = by_id.get(span.parent_id)
        assert (parent is None) == (span.name == root), f"{span.name}: no parent"
        if parent is not None and parent.process == span.process:
            assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns, span.name


def test_a_request_is_one_trace(rig: Rig) -> None:
    trace_id, prompt = "1" * 32, [7, *PROMPTS[0]]

    worker_id = rig.ask(trace_id, prompt)
    spans = rig.tree(trace_id, ROOT, "route", "request", "queue", "prefill", "decode")
    _check_nested(spans)
    assert spans[ROOT].parent_id == "c" * 16
    assert spans[ROOT].attributes["http.response.status_code"] == 200
    assert spans[ROOT].attributes["gen_ai.usage.input_tokens"] == len(prompt)
    assert spans["route"].attributes["xllm.worker_id"] == worker_id
    assert spans["route"].parent_id == spans["request"].parent_id == spans[ROOT].span_id
    assert (spans[ROOT].kind, spans["request"].kind, spans["queue"].kind) == (
        *("server", "server", "internal"),
    )
    assert spans[ROOT].process == spans["route"].process
    assert spans["request"].process == f"xllm-worker {worker_id}"
    assert spans["request"].attributes["gen_ai.usage.output_tokens"] == 4
    assert spans["prefill"].attributes["xllm.computed_tokens"] == len(prompt)
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent_id == spans["request"].span_id
    assert spans["queue"].end_ns == spans["prefill"].start_ns
    assert spans["prefill"].end_ns == spans["decode"].start_ns
    assert spans["decode"].end_ns == spans["request"].end_ns


def test_blocks_of_a_peer_and_of_a_tier_are_in_the_trace(rig: Rig) -> None:
    for number, prompt in enumerate(PROMPTS):
        fetched = f"2{number}" * 16
        first = rig.ask(f"3{number}" * 16, prompt)
        rig.until_indexed(first, prompt)
        second = rig.ask(fetched, prompt)
        assert second != first, "in turn"
        fetch = rig.fetch(fetched)
        if fetch is not None and fetch.attributes.get("xllm.num_sound") == NUM_BLOCKS:
            break
    names = (ROOT, "route", "request", "queue", "load remote", "fetch blocks", "serve blocks")
    spans = rig.tree(fetched, *names, "prefill", "decode")
    _check_nested(spans)
    assert spans["route"].attributes["xllm.fetched_blocks"] == NUM_BLOCKS
    assert spans["load remote"].attributes == {"xllm.tier": "remote", "xllm.num_blocks": NUM_BLOCKS}
    assert spans["fetch blocks"].parent_id == spans["request"].span_id
    assert spans["fetch blocks"].attributes["xllm.peer"] == first
    assert spans["fetch blocks"].attributes["xllm.num_sound"] == NUM_BLOCKS
    assert spans["serve blocks"].parent_id == spans["fetch blocks"].span_id
    assert spans["serve blocks"].process == f"xllm-worker {first}"
    sent = [n for k, n in spans["serve blocks"].attributes.items() if "sent_blocks" in k]
    assert sum(map(int, map(str, sent))) == NUM_BLOCKS
    assert (spans["fetch blocks"].kind, spans["serve blocks"].kind) == ("client", "server")
    assert spans["prefill"].attributes["xllm.computed_tokens"] == 5

    loaded = "4" * 32
    _keep_in_host_only(rig.worker(first), prompt)
    assert rig.ask(loaded, prompt) == first
    spans = rig.tree(loaded, ROOT, "route", "request", "queue", "load host", "prefill", "decode")
    _check_nested(spans)
    assert spans["load host"].attributes == {"xllm.tier": "host", "xllm.num_blocks": NUM_BLOCKS}
    assert spans["queue"].end_ns == spans["load host"].start_ns
    assert spans["request"].attributes["xllm.cached_tokens.host"] == NUM_BLOCKS * BLOCK


def _keep_in_host_only(worker: Worker, prompt: list[int]) -> None:
    admin = f"{worker.operator_url}/admin/cache"

    def is_held() -> bool:
        held = post_json(f"{admin}/lookup", {"token_ids": prompt})["held_tokens_by_tier"]
        return bool(held["host"] == NUM_BLOCKS * BLOCK)

    wait_until(is_held, "blocks in the host tier", WAIT_S)
    post_json(f"{admin}/clear", {"tier": "device"})


def test_what_a_client_does_not_want_to_be_traced_is_not(rig: Rig) -> None:
    unsampled, refused = "5" * 32, "6" * 32
    rig.ask(unsampled, PROMPTS[0], flags="00")
    with pytest.raises(urllib.error.HTTPError) as caught:
        rig.ask(refused, PROMPTS[0], max_tokens=-1)
    caught.value.close()
    spans = rig.tree(refused, ROOT)
    assert spans[ROOT].attributes["http.response.status_code"] == 400
    assert not spans[ROOT].is_error, "the client's own"
    assert rig.collector.spans(unsampled) == []


def test_a_collector_that_is_away_keeps_nobody(launcher: Launcher, tmp_path: Path) -> None:
    model = write_chaos_model(tmp_path / "model")
    worker = launcher.worker(
        None,
        *(f"--model={model}", "--enable_service_routing=false", "--max_cache_size=16MiB"),
        f"--otlp_endpoint=http://127.0.0.1:{processes.free_port()}",
    )
    body = {"model": model.name, "prompt": PROMPTS[0], "max_tokens": 2}
    assert post_json(f"{worker.http_url}{PATH}", body)["usage"]["completion_tokens"] == 2
    assert worker.stop() == 0
