"""What `scripts/quickstart` runs once xllm is installed: a cluster of three processes, and with
--store two more: a mooncake_master, and a process that lends a shared pool its memory.

Each process is in a session of its own, so that Ctrl-C reaches this script alone, which then ends
them in order: workers, which deregister, before the master, whose embedded etcd ends with it.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from xllm.engine.memory import available_memory_bytes
from xllm.errors import ConfigError
from xllm.model_store import DEFAULT_MODEL_ID, resolve_model

HTTP_PORT = 8888
OPERATOR_PORT = 8889
WORKER_PORTS = (8010, 8011)
NUM_WORKERS = len(WORKER_PORTS)
STORE_PORT = 50051
STORE_HTTP_PORT = 9003
POOL_PORT = 50052
POOL_BYTES = 1 << 30
URL = f"http://127.0.0.1:{HTTP_PORT}"

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER_HAS = "Paris"

READY_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 60
STOP_TIMEOUT_S = 6.0
POLL_S = 0.1
NEWS_PERIOD_S = 5.0
MAX_CACHE_BYTES = 4 << 30
"""Of all workers together: what a single one would take by default."""


class QuickstartError(Exception):
    """What went wrong, and what to do."""


@dataclass(frozen=True)
class Process:
    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path
    health_url: str

    def check(self) -> None:
        """Raises: QuickstartError with the end of its log, if it has ended."""
        if self.popen.poll() is not None:
            last_lines = "\n".join(self.log_path.read_text().splitlines()[-15:])
            raise QuickstartError(
                f"{self.name} ended with exit code {self.popen.returncode}:\n{last_lines}"
            )


def say(line: str) -> None:
    print(f"quickstart: {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the answer: 0 if right")
    parser.add_argument(
        "--store", action="store_true", help="with a shared pool, which outlives the workers"
    )
    options = parser.parse_args()
    # Whoever ends this script also wants its processes to end.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    processes: list[Process] = []
    try:
        return run(processes, once=options.once, with_store=options.store)
    except KeyboardInterrupt:
        return 0 if not options.once else 130
    except (QuickstartError, ConfigError) as error:
        say(str(error))
        return 1
    finally:
        stop(processes)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def run(processes: list[Process], *, once: bool, with_store: bool) -> int:
    check_tools_and_ports(with_store=with_store)
    resolve_model(None, progress=say)
    logs = Path(tempfile.mkdtemp(prefix="xllm-quickstart-"))
    pool = " and a shared pool" if with_store else ""
    say(f"starting etcd, a master, {NUM_WORKERS} workers{pool}; logs in {logs}")
    started_at = time.monotonic()
    store_flags = start_pool(processes, logs) if with_store else []
    start_cluster(processes, logs, store_flags)
    wait_until_ready(processes)
    say(f"ready after {time.monotonic() - started_at:.0f} s")

    command = curl_command()
    say(f"asking: {QUESTION}")
    answer = ask(command)
    right = ANSWER_HAS in answer
    if not right:
        say(f"that is not the right answer: it should name {ANSWER_HAS}")
    if once:
        return 0 if right else 1
    print(f"\nAsk something else:\n\n  {shlex.join(command)}\n", flush=True)
    say(f"see the cluster at http://127.0.0.1:{OPERATOR_PORT}/; the API is at {URL}/v1")
    say(f"logs are in {logs}; Ctrl-C stops everything")
    while True:
        for process in processes:
            process.check()
        time.sleep(1.0)


def check_tools_and_ports(*, with_store: bool) -> None:
    if with_store and importlib.util.find_spec("mooncake") is None:
        raise QuickstartError("mooncake is missing: pip install '.[mooncake]'")
    if with_store and ctypes.util.find_library("ibverbs") is None:
        raise QuickstartError("libibverbs1 is missing: apt install libibverbs1")
    if shutil.which("curl") is None:
        raise QuickstartError("curl is missing; install it with your package manager")
    store_ports = (STORE_PORT, STORE_HTTP_PORT, POOL_PORT) if with_store else ()
    for port in (HTTP_PORT, OPERATOR_PORT, *WORKER_PORTS, *store_ports):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise QuickstartError(
                    f"port {port} of 127.0.0.1 is taken ({error.strerror}); stop what uses it,"
                    " perhaps an earlier quickstart, and start again"
                ) from error


def launch(processes: list[Process], logs: Path, name: str, health_url: str, *command: str) -> None:
    """`health_url`: empty for one that has none."""
    log_path = logs / f"{name}.log"
    with log_path.open("wb") as log:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes.append(Process(name, popen, log_path, health_url))


def start_pool(processes: list[Process], logs: Path) -> list[str]:
    """-> the flags of workers that use it."""
    programs = Path(sys.executable).parent
    address = f"127.0.0.1:{STORE_PORT}"
    launch(
        *(processes, logs, "store-master", f"http://127.0.0.1:{STORE_HTTP_PORT}/health"),
        *(str(programs / "mooncake_master"), f"-rpc_port={STORE_PORT}"),
        *(f"-metrics_port={STORE_HTTP_PORT}", "-metrics_host=127.0.0.1"),
    )
    launch(
        *(processes, logs, "store-memory", "", str(programs / "mooncake_client")),
        *(f"-master_server_address={address}", "-metadata_server=P2PHANDSHAKE"),
        *("-host=127.0.0.1", "-protocol=tcp", f"-port={POOL_PORT}"),
        f"-global_segment_size={POOL_BYTES} B",
    )
    return ["--enable_kvcache_store", f"--store_master_server_address={address}"]


def start_cluster(processes: list[Process], logs: Path, worker_flags: list[str]) -> None:
    """Starts all at once: whoever comes before etcd waits for it."""
    num_threads = max(1, len(os.sched_getaffinity(0)) // NUM_WORKERS)
    cache_bytes = min(MAX_CACHE_BYTES, available_memory_bytes() // 4) // NUM_WORKERS

    def start(name: str, health_url: str, *flags: str) -> None:
        launch(processes, logs, name, health_url, sys.executable, "-m", "xllm", *flags)

    start(
        *("master", f"{URL}/health"),
        *("--role=master", f"--http_server_port={HTTP_PORT}"),
        f"--rpc_server_port={OPERATOR_PORT}",
    )
    for number, port in enumerate(WORKER_PORTS, start=1):
        operator_port = free_port()
        start(
            *(f"worker-{number}", f"http://127.0.0.1:{operator_port}/health"),
            *("--role=worker", f"--port={port}", f"--rpc_server_port={operator_port}"),
            *("--enable_cache_upload=true", f"--num_threads={num_threads}"),
            *(f"--max_cache_size={cache_bytes}", *worker_flags),
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(processes: list[Process]) -> None:
    started_at = time.monotonic()
    news_at = started_at + NEWS_PERIOD_S
    waiting = list(processes)
    while waiting:
        for process in processes:
            process.check()
        waiting = [
            process
            for process in waiting
            if process.health_url and not is_healthy(process.health_url)
        ]
        now = time.monotonic()
        names = ", ".join(process.name for process in waiting)
        if waiting and now - started_at > READY_TIMEOUT_S:
            raise QuickstartError(
                f"not ready within {READY_TIMEOUT_S:.0f} s: {names}; see the logs"
            )
        if waiting and now >= news_at:
            say(f"waiting for {names} ({now - started_at:.0f} s)")
            news_at = now + NEWS_PERIOD_S
        time.sleep(POLL_S)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def curl_command() -> list[str]:
    body = {
        "model": DEFAULT_MODEL_ID,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
    }
    return [
        *("curl", "-sSN", f"{URL}/v1/chat/completions"),
        *("-H", "Content-Type: application/json", "-d", json.dumps(body)),
    ]


def ask(command: list[str]) -> str:
    """Prints the answer as it comes, and returns it."""
    answer = ""
    limits = ["--max-time", str(ANSWER_TIMEOUT_S), "--fail-with-body"]
    with subprocess.Popen([*command, *limits], stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        for line in curl.stdout:
            event = line.removeprefix("data: ").strip()
            if not line.startswith("data: "):
                # Blank between events, or the body of an error.
                print(event, end="\n" if event else "", flush=True)
            elif event != "[DONE]":
                for choice in json.loads(event)["choices"]:
                    piece = choice["delta"].get("content") or ""
                    answer += piece
                    print(piece, end="", flush=True)
    print(flush=True)
    if curl.returncode != 0:
        raise QuickstartError(f"curl failed with exit code {curl.returncode}")
    return answer


def stop(processes: list[Process]) -> None:
    """Ends every process; a second Ctrl-C kills what is left."""
    workers = [process for process in processes if process.name.startswith("worker")]
    rest = [process for process in processes if process not in workers]
    try:
        for group in (workers, rest):
            end_all(group, lambda popen: popen.terminate())
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        say("killing what has not ended")
    finally:
        end_all(processes, lambda popen: popen.kill())


def end_all(processes: list[Process], end: Callable[[subprocess.Popen[bytes]], None]) -> None:
    for process in processes:
        end(process.popen)
    for process in processes:
        process.popen.wait(STOP_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
