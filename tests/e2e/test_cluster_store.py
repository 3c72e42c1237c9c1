"""A cluster over a shared store: real processes, the real model in float32, and a pool that
outlives every worker. The same greedy tokens, whoever computed the blocks and whoever is gone."""

from __future__ import annotations

import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Launcher, Master, Worker, post_json, wait_until

from tests.golden.prompts import prose_prompt
from tests.missing import skip_or_fail
from tests.mooncake_pool import MooncakePool, why_not
from xllm.tokenizer import Tokenizer

MODEL = "SmolLM2-135M-Instruct"
LENGTHS = (100, 1000)
BLOCK_SIZE = 32


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[MooncakePool]:
    reason = why_not()
    if reason is not None:
        skip_or_fail(reason)
    pool = MooncakePool(tmp_path, 512 << 20)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


class Rig:
    def __init__(self, launcher: Launcher, pool: MooncakePool, folder: Path) -> None:
        self._launcher = launcher
        self._pool = pool
        self._folder = folder
        self._num_workers = 0
        self._etcd = launcher.etcd()
        self.master: Master = launcher.master(self._etcd)

    def worker(self) -> Worker:
        """With a disk on which nothing is, and nobody else's blocks will be."""
        self._num_workers += 1
        disk = self._folder / f"disk-{self._num_workers}"
        worker = self._launcher.worker(
            self._etcd,
            *("--dtype=float32", "--max_cache_size=256M", "--enable_cache_upload=true"),
            *("--max_model_len=2048", f"--disk_cache_dir={disk}", "--disk_cache_size=256M"),
            *("--enable_kvcache_store", f"--store_master_server_address={self._pool.address}"),
            *("--enable_peer_fetch=false", "--prefetch_timeout=60000"),
        )
        wait_until(lambda: "store_attached" in worker.log, "the store attached", 60)
        return worker

    def ask(self, prompt: list[int]) -> tuple[str, dict[str, int]]:
        """The text, and cached tokens by tier."""
        body = {
            **{"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0},
            "ignore_eos": True,
        }
        answer = post_json(f"{self.master.http_url}/v1/completions", body, timeout_s=120)
        details = answer["usage"]["prompt_tokens_details"]
        return answer["choices"][0]["text"], details["cached_tokens_by_tier"]

    def until_alone(self, worker: Worker) -> None:
        """Until requests can only go to this one."""

        def is_alone() -> bool:
            url = f"{self.master.operator_url}/admin/cluster"
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            return worker.worker_id in text and text.count('"state":"ready"') == 1

        wait_until(is_alone, "a cluster of one worker", 60)


def in_store(worker: Worker, prompt: list[int]) -> bool:
    url = f"{worker.operator_url}/admin/cache/lookup"
    held = post_json(url, {"token_ids": prompt})["held_tokens_by_tier"]
    return bool(held["remote"] >= len(prompt) // BLOCK_SIZE * BLOCK_SIZE)


@pytest.mark.timeout(400)
def test_the_same_tokens_when_every_worker_has_been_replaced_and_its_disk_wiped(
    launcher: Launcher, pool: MooncakePool, tmp_path: Path, default_model_folder: Path
) -> None:
    encode = Tokenizer.from_folder(default_model_folder).encode
    prompts = [prose_prompt(length, seed, encode) for seed, length in enumerate(LENGTHS)]
    rig = Rig(launcher, pool, tmp_path)
    first = rig.worker()
    rig.until_alone(first)
    cold = [rig.ask(prompt) for prompt in prompts]
    assert all(sum(cached.values()) == 0 for _, cached in cold)
    for prompt in prompts:
        wait_until(lambda prompt=prompt: in_store(first, prompt), "blocks in the store", 60)

    # Another worker, which has nothing: the master reckons with the store for it, too.
    second = rig.worker()
    url = f"{rig.master.operator_url}/admin/route"

    def is_near() -> bool:
        routes = post_json(url, {"token_ids": prompts[1], "model": MODEL})["candidates"]
        blocks = {route["worker_id"]: route["prefix_blocks"] for route in routes}
        return blocks.get(second.worker_id, {}).get("remote") == LENGTHS[1] // BLOCK_SIZE

    wait_until(is_near, "the store to be near a new worker", 60)

    first.send(signal.SIGKILL)
    first.wait()
    rig.until_alone(second)
    check(rig, prompts, cold)

    # Nobody is left who knows what the store has, and no disk.
    second.send(signal.SIGKILL)
    second.wait()
    third = rig.worker()
    rig.until_alone(third)
    check(rig, prompts, cold)
    assert third.stop() == 0


def check(rig: Rig, prompts: list[list[int]], cold: list[tuple[str, dict[str, int]]]) -> None:
    for prompt, (text, _) in zip(prompts, cold, strict=True):
        again, cached = rig.ask(prompt)
        assert again == text
        assert cached.get("remote", 0) >= len(prompt) - BLOCK_SIZE, cached
