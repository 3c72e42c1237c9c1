"""Operators ask any master about the cluster: real processes, two masters, two workers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import select
import socket
import struct
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import pytest
from processes import Launcher, Master, Worker, post_json, wait_until

MODEL = "SmolLM2-135M-Instruct"
WORKER_FLAGS = (
    *("--dtype=float32", "--max_cache_size=128M", "--max_model_len=1024", "--num_threads=1"),
    *("--host_cache_size=64M",),
    *("--max_tokens_per_batch=64", "--max_seqs_per_batch=8", "--enable_cache_upload=true"),
)
BLOCK = 32
PROMPTS = [random.Random(seed).choices(range(1000, 20000), k=100) for seed in range(6)]


@dataclass
class Rig:
    masters: list[Master]
    workers: list[Worker]

    def ask(self, prompt: list[int]) -> None:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        post_json(f"{self.masters[0].http_url}/v1/completions", body)


def admin(process: Master | Worker, action: str, **body: object) -> dict[str, Any]:
    return post_json(f"{process.operator_url}/admin/{action}", body)


def show(master: Master) -> dict[str, Any]:
    with urllib.request.urlopen(f"{master.operator_url}/admin/cluster", timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def tiers(cluster: dict[str, Any], key: str) -> dict[tuple[str, str], int]:
    return {
        (worker["worker_id"], tier): of_tier.get(key, 0)
        for worker in cluster["workers"]
        for tier, of_tier in worker["tiers"].items()
    }


@pytest.fixture(scope="module")
def rig(module_launcher: Launcher, default_model_folder: object) -> Rig:
    etcd = module_launcher.etcd()
    workers = [module_launcher.worker(etcd, *WORKER_FLAGS, wait_ready=False) for _ in range(2)]
    masters = [module_launcher.master(etcd, "--load_balance_policy=RR") for _ in range(2)]
    rig = Rig(masters, workers)

    def are_ready() -> bool:
        states = [w["state"] for m in masters for w in show(m)["workers"]]
        return states == ["ready"] * 4

    wait_until(are_ready, "both masters to reach both workers", 60)
    return rig


def test_both_masters_know_what_the_workers_hold(rig: Rig) -> None:
    for prompt in PROMPTS:
        rig.ask(prompt)

    def is_indexed() -> bool:
        for master in rig.masters:
            cluster = show(master)
            used = tiers(cluster, "used_blocks")
            if used != tiers(cluster, "indexed_blocks") or sum(used.values()) < 2 * 18:
                return False
        return True

    wait_until(is_indexed, "an index of all that the workers hold", 15)
    first, second = map(show, rig.masters)
    assert [m["master_id"] for m in first["masters"]] == [m["master_id"] for m in second["masters"]]
    assert len(first["masters"]) == 2
    leaders = [m["master_id"] for m in first["masters"] if m["is_leader"]]
    assert leaders == [first["leader"]] == [second["leader"]]
    assert first["etcd"]["connected"]
    for worker in first["workers"]:
        assert worker["upload_share"]["puts_per_s"] == pytest.approx(499, abs=1)
        assert worker["load"]["prefill_tokens_per_s"] > 0
        assert set(worker["tiers"]) == {"device", "host"}
        assert worker["tiers"]["host"]["block_s"] > 0

    by_id = {worker.worker_id: worker for worker in rig.workers}
    for prompt in PROMPTS:
        looked_up = admin(rig.masters[1], "cache/lookup", token_ids=prompt)
        assert looked_up["complete"]
        assert looked_up["prompt_tokens"] == len(prompt)
        assert sum(w["matched_tokens"] for w in looked_up["workers"].values()) == 3 * BLOCK
        for worker_id, answer in looked_up["workers"].items():
            own = admin(by_id[worker_id], "cache/lookup", token_ids=prompt)
            for key in ("matched_tokens", "matched_tokens_by_tier", "held_tokens_by_tier"):
                assert answer[key] == own[key]
            held = {t: n for t, n in own["matched_tokens_by_tier"].items() if n}
            assert answer["indexed_tokens_by_tier"] == held


def test_a_prompt_is_moved_to_the_worker_that_does_not_have_it(rig: Rig) -> None:
    prompt = random.Random(99).choices(range(1000, 20000), k=100)
    rig.ask(prompt)
    found = admin(rig.masters[0], "cache/lookup", token_ids=prompt)["workers"]
    [target] = [worker_id for worker_id, w in found.items() if not w["matched_tokens"]]
    [source] = found.keys() - {target}
    moved = admin(rig.masters[1], "cache/move", token_ids=prompt, to=target)
    assert moved["source"] == source
    assert moved["workers"] == {target: {"state": "done", "fetched_blocks": 3}}
    again = admin(rig.masters[1], "cache/move", token_ids=prompt, to=target)
    assert again["workers"] == {target: {"state": "done", "fetched_blocks": 0}}
    found = admin(rig.masters[0], "cache/lookup", token_ids=prompt)["workers"]
    assert {w["matched_tokens"] for w in found.values()} == {3 * BLOCK}


def test_pinned_through_one_master_cleared_through_the_other(rig: Rig) -> None:
    first, second = rig.masters
    rig.ask(PROMPTS[0])
    pinned = admin(first, "cache/pin", token_ids=PROMPTS[0], ttl=60)
    assert {w["pinned_blocks"] for w in pinned["workers"].values()} == {3}
    one = rig.workers[0].worker_id
    unpinned = admin(second, "cache/unpin", token_ids=PROMPTS[0], workers=[one])
    assert unpinned["workers"] == {one: {"state": "done", "unpinned_blocks": 3}}

    cleared = admin(second, "cache/clear", tier="device")
    assert cleared["complete"]
    assert sum(w["cleared_blocks"]["device"] for w in cleared["workers"].values()) >= 3
    assert all("host" not in w["cleared_blocks"] for w in cleared["workers"].values())

    def is_seen() -> bool:
        held = [tiers(show(master), "indexed_blocks") for master in rig.masters]
        return all(not n for tier_of in held for (_, t), n in tier_of.items() if t == "device")

    wait_until(is_seen, "both masters to know of the empty devices", 10)
    assert sum(tiers(show(first), "indexed_blocks").values()) > 0


def test_what_cannot_be_done_says_why(rig: Rig) -> None:
    for action, body, reason in (
        ("cache/clear", {"workers": ["nobody"]}, b"no such worker: nobody"),
        ("drain", {}, b"workers"),
        ("cache/lookup", {"text": "x", "model": "other"}, b"does not exist"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            admin(rig.masters[0], action, **body)
        with refused.value as error:
            assert error.code in (400, 404)
            assert reason in error.read()


def command(master: Master, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`xllm ARGUMENTS` for operators."""
    return subprocess.run(
        [sys.executable, "-m", "xllm", *arguments, f"--operator={master.operator_url}"],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_commands_of_a_terminal(rig: Rig) -> None:
    master = rig.masters[0]
    ids = {worker.worker_id for worker in rig.workers}
    cluster = command(master, "cluster", "--json")
    assert cluster.returncode == 0
    assert {worker["worker_id"] for worker in json.loads(cluster.stdout)["workers"]} == ids
    table = command(master, "cluster")
    assert "leads" in table.stdout
    for worker_id in ids:
        assert worker_id in table.stdout

    prompt = random.Random(7).choices(range(1000, 20000), k=100)
    rig.ask(prompt)
    token_ids = "--token_ids=" + ",".join(map(str, prompt))
    looked_up = command(master, "cache", "lookup", token_ids, "--json")
    held = {w: a["matched_tokens"] for w, a in json.loads(looked_up.stdout)["workers"].items()}
    assert sorted(held.values()) == [0, 3 * BLOCK]
    target = min(held, key=lambda worker_id: held[worker_id])
    moved = command(master, "cache", "move", token_ids, f"--to={target}", "--json")
    assert json.loads(moved.stdout)["workers"][target]["fetched_blocks"] == 3
    for action in ("pin", "unpin"):
        assert command(master, "cache", action, token_ids, "-w", target).returncode == 0
    cleared = command(master, "cache", "clear", "--tier=device", "--worker", target, "--json")
    assert json.loads(cleared.stdout)["workers"].keys() == {target}
    unknown = command(master, "drain", "nobody:1")
    assert (unknown.returncode, unknown.stderr) == (2, "xllm: no such worker: nobody:1\n")
    nobody = command(master, "cluster", "--operator_ca=/nowhere")
    assert nobody.returncode == 0, "a CA is for https"


def test_nobody_answers_a_command() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-m", "xllm", "top", f"--operator={url}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"xllm: {url} does not answer: ")


def test_top_in_a_terminal_until_q(rig: Rig) -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 180, 0, 0))
    command_line = [sys.executable, "-m", "xllm", "top", "--interval=0.2"]
    process = subprocess.Popen(
        [*command_line, f"--operator={rig.masters[1].operator_url}"],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(its)
    seen = b""

    def is_shown() -> bool:
        nonlocal seen
        if select.select([ours], [], [], 0.1)[0]:
            seen += os.read(ours, 65536)
        names = [worker.worker_id.encode() for worker in rig.workers]
        # Twice, so that it has looked again.
        return all(seen.count(name) >= 2 for name in names)

    try:
        wait_until(is_shown, "both workers in the terminal", 60)
        os.write(ours, b"q")

        def has_ended() -> bool:
            with contextlib.suppress(OSError):  # how a terminal says that nobody is there
                is_shown()
            return process.poll() is not None

        wait_until(has_ended, "its end", 60)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert process.returncode == 0


def test_a_worker_is_drained_through_a_master(rig: Rig) -> None:
    staying, leaving = rig.workers
    drained = command(rig.masters[1], "drain", leaving.worker_id, "--timeout=1", "--json")
    assert drained.returncode == 0
    answer = json.loads(drained.stdout)
    assert answer["workers"] == {leaving.worker_id: {"state": "done", "draining": True}}
    assert leaving.wait(10) == 0
    for master in rig.masters:
        wait_until(
            lambda master=master: (
                [w["worker_id"] for w in show(master)["workers"]] == [staying.worker_id]
            ),
            "the worker to be gone",
            10,
        )
    wait_until(
        lambda: show(rig.masters[0])["workers"][0]["upload_share"]["puts_per_s"] > 900,
        "all of the budget to be given to the one that is left",
        5,
    )
    rig.ask(PROMPTS[3])
