"""The same greedy tokens from every tier: real processes, the real model, in float32."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import Launcher, Worker, post_json, wait_until

from tests.golden.prompts import prose_prompt
from xllm.model_store import resolve_model
from xllm.tokenizer import Tokenizer

LENGTHS = (100, 1000, 4000)
NUM_OUTPUT_TOKENS = 16
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Answer:
    text: str
    cached_by_tier: dict[str, int]


@dataclass
class Rig:
    launcher: Launcher
    disk: Path
    prompts: dict[int, list[int]]

    def start(self) -> Worker:
        return self.launcher.worker(
            None,
            *("--enable_service_routing=false", "--dtype=float32", "--max_cache_size=600MiB"),
            *("--host_cache_size=400MiB", f"--disk_cache_dir={self.disk}"),
            *("--disk_cache_size=700MiB", "--disk_write_policy=write_through"),
            "--prefetch_timeout=60000",
        )

    def ask(self, worker: Worker, prompt: list[int], salt: str = "") -> Answer:
        body = {
            "prompt": prompt,
            "max_tokens": NUM_OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt or None,
        }
        answer = post_json(f"{worker.http_url}/v1/completions", body, timeout_s=300)
        details = answer["usage"]["prompt_tokens_details"]
        return Answer(answer["choices"][0]["text"], details["cached_tokens_by_tier"])

    def ask_all(self, worker: Worker) -> dict[int, Answer]:
        """With other requests beside them."""
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            beside = [
                threads.submit(self.ask, worker, [i + 100, *self.prompts[100]], f"beside {i}")
                for i in range(2)
            ]
            asked = {n: threads.submit(self.ask, worker, p) for n, p in self.prompts.items()}
            for future in beside:
                future.result()
            return {length: future.result() for length, future in asked.items()}

    def check(self, worker: Worker, cold: dict[int, Answer], tier: str) -> None:
        """The same texts, and all full blocks from `tier`."""
        for length, answer in self.ask_all(worker).items():
            assert answer.text == cold[length].text, f"{length} tokens from {tier}"
            assert sum(answer.cached_by_tier.values()) >= length - BLOCK_SIZE, answer
            # The longest prompts share nothing, and what is loaded once is on the device then.
            assert answer.cached_by_tier.get(tier, 0) >= length - BLOCK_SIZE, answer

    def admin(self, worker: Worker, action: str, **body: object) -> dict[str, Any]:
        return post_json(f"{worker.operator_url}/admin/cache/{action}", body)

    def wait_held(self, worker: Worker, *tiers: str) -> None:
        """Until these tiers have every full block of every prompt."""

        def is_held() -> bool:
            for length, prompt in self.prompts.items():
                held = self.admin(worker, "lookup", token_ids=prompt)["held_tokens_by_tier"]
                if any(held[tier] < length // BLOCK_SIZE * BLOCK_SIZE for tier in tiers):
                    return False
            return True

        wait_until(is_held, f"blocks in {tiers}", 60)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = resolve_model(None, progress=print)
    tokenizer = Tokenizer.from_folder(folder)
    prompts = {n: prose_prompt(n, seed, tokenizer.encode) for seed, n in enumerate(LENGTHS)}
    with processes.launcher(tmp_path_factory.mktemp("processes")) as launcher:
        yield Rig(launcher, tmp_path_factory.mktemp("disk"), prompts)


@pytest.mark.timeout(600)
def test_the_same_tokens_from_every_tier_and_after_a_restart(rig: Rig) -> None:
    worker = rig.start()
    cold = rig.ask_all(worker)
    assert all(sum(answer.cached_by_tier.values()) == 0 for answer in cold.values())
    rig.wait_held(worker, "device", "host", "disk")
    rig.check(worker, cold, "device")
    rig.admin(worker, "clear", tier="device")
    rig.check(worker, cold, "host")
    rig.admin(worker, "clear", tier="device")
    rig.admin(worker, "clear", tier="host")
    rig.check(worker, cold, "disk")
    metrics = _metrics(worker)
    for tier in ("host", "disk"):
        assert metrics[f'xllm_tier_promotions_total{{tier="{tier}"}}'] >= 155
        assert metrics[f'xllm_tier_hits_total{{tier="{tier}"}}'] >= 5000
    assert metrics["xllm_tier_checksum_failures_total"] == 0
    assert worker.stop() == 0

    worker = rig.start()
    rig.check(worker, cold, "disk")
    assert _writes_are_killed(rig, worker) > 0
    assert worker.wait() == -signal.SIGKILL

    worker = rig.start()
    rig.check(worker, cold, "disk")
    for i in range(3):
        assert rig.ask(worker, *_fresh(rig, i)).text == cold[1000].text
    assert worker.stop() == 0


def _fresh(rig: Rig, i: int) -> tuple[list[int], str]:
    """A prompt with blocks of its own."""
    return rig.prompts[1000], f"fresh {i}"


def _writes_are_killed(rig: Rig, worker: Worker) -> float:
    """kill -9 while new blocks are being written; returns how many had been."""
    key = 'xllm_tier_demotions_total{tier="disk"}'
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(rig.ask, worker, *_fresh(rig, i)) for i in range(3)]
        deadline = time.monotonic() + 60
        while (num_written := _metrics(worker).get(key, 0.0)) == 0:
            assert time.monotonic() < deadline
        worker.send(signal.SIGKILL)
        for future in futures:
            future.exception()
    return num_written


def _metrics(worker: Worker) -> dict[str, float]:
    with urllib.request.urlopen(f"{worker.operator_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        match[1]: float(match[2])
        for match in re.finditer(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)
    }


def test_pins_and_errors_of_the_operator_port(rig: Rig) -> None:
    worker = rig.start()
    prompt = rig.prompts[100]
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert rig.admin(worker, "lookup", **chat)["prompt_tokens"] > 5
    assert rig.admin(worker, "lookup", text="Once upon a time")["prompt_tokens"] == 4
    assert rig.admin(worker, "pin", token_ids=prompt, ttl=60)["pinned_blocks"] == 3
    assert rig.admin(worker, "unpin", token_ids=prompt)["unpinned_blocks"] == 3
    for action, body in (
        ("lookup", {}),
        ("lookup", {"text": "a", "token_ids": [1]}),
        ("lookup", {"token_ids": [1 << 30]}),
        ("pin", {"text": "a"}),
        ("pin", {"text": "a", "ttl": -1}),
        ("clear", {"tier": "moon"}),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            rig.admin(worker, action, **body)
        assert caught.value.code == 400
        assert b'"error"' in caught.value.read()
    assert worker.stop() == 0
