"""How the `xllm` command ends: exit codes, one-line errors, signals at any moment."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Launcher, free_port

from xllm import __version__

ALONE = ("--role=worker", "--enable_service_routing=false", "--port=0", "--num_threads=1")
"""A worker that needs nobody else."""


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """The installed command, to its end."""
    command = Path(sys.executable).with_name("xllm")
    return subprocess.run(
        [str(command), *flags],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"xllm {__version__}\n", "")


def test_help() -> None:
    ended = run("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for heading in ("Both roles", "--role=master", "--role=worker"):
        assert f"\n{heading}\n" in ended.stdout


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--role is missing"]),
        (["--role=master", "--htp_server_port=1"], ["--htp_server_port", "--http_server_port"]),
        (["--role=worker", "--http_server_port=1"], ["a flag of --role=master"]),
        (["--role=worker", "--enable_disagg_pd=true"], ["not supported yet"]),
        ([*ALONE, "--model=/does/not/exist"], ["--model=/does/not/exist", "no such folder"]),
        ([*ALONE, "--host=203.0.113.1"], ["--host=203.0.113.1", "not an address of this machine"]),
        (
            ["--role=master", "--http_server_port=0", "--etcd_addr=203.0.113.1:2379"],
            ["--host=127.0.0.1", "203.0.113.1:2379", "--host="],
        ),
    ],
)
def test_a_configuration_error_is_one_line_and_exit_code_2(
    flags: list[str], parts: list[str]
) -> None:
    ended = run(*flags)
    assert ended.returncode == 2
    last_line = ended.stderr.splitlines()[-1]
    assert last_line.startswith("xllm: ")
    assert "Traceback" not in ended.stderr
    for part in parts:
        assert part in last_line


def test_a_cache_smaller_than_one_request_is_refused(default_model_folder: Path) -> None:
    ended = run(*ALONE, f"--model={default_model_folder}", "--max_cache_size=1M")
    assert ended.returncode == 2
    assert "--max_model_len=8192" in ended.stderr.splitlines()[-1]
    assert str(1 << 20) in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--role=master", "--rpc_server_port=0"], "http_server_port"),
        (["--role=master", "--http_server_port=0"], "rpc_server_port"),
        (["--role=worker"], "port"),
    ],
)
def test_a_taken_port_names_its_flag(flags: list[str], flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run(*flags, f"--{flag}={port}")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"xllm: --{flag}={port}: ")


@pytest.mark.parametrize("role", ["master", "worker"])
def test_without_etcd_the_exit_code_is_3(launcher: Launcher, role: str) -> None:
    # Half a second is as good as the half minute that a process waits.
    program = (
        "import sys, xllm.main\n"
        "from xllm.coordination import EtcdClient\n"
        "connect = EtcdClient.connect\n"
        "EtcdClient.connect = lambda client, wait_s: connect(client, 0.5)\n"
        "sys.argv[0] = 'xllm'\n"
        "xllm.main.main()"
    )
    ports = ["--http_server_port=0", "--rpc_server_port=0"] if role == "master" else ["--port=0"]
    address = f"127.0.0.1:{free_port()}"
    process = launcher.spawn(
        role,
        [sys.executable, "-c", program, f"--role={role}", *ports, f"--etcd_addr={address}"],
    )
    assert process.wait(60) == 3
    assert process.log.splitlines()[-1].startswith("xllm: ")
    assert address in process.log.splitlines()[-1]


@pytest.mark.parametrize("moment", ["model_loading", "cache_sized", "worker_ready"])
def test_a_worker_stops_at_any_moment(
    launcher: Launcher, default_model_folder: Path, moment: str
) -> None:
    worker = launcher.xllm(*ALONE, f"--model={default_model_folder}", "--max_cache_size=512M")
    worker.wait_for_log(moment)
    assert worker.stop() == 0


@pytest.mark.parametrize("flags", [("--role=master",), ("--role=worker",)])
def test_a_role_that_waits_for_etcd_stops(launcher: Launcher, flags: tuple[str, ...]) -> None:
    ports = (
        ("--http_server_port=0", "--rpc_server_port=0") if "master" in flags[0] else ("--port=0",)
    )
    process = launcher.xllm(*flags, *ports, f"--etcd_addr=127.0.0.1:{free_port()}")
    process.wait_for_log("waiting for etcd")
    assert process.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("delay_s", [0.2, 0.5, 1.0, 2.0])
def test_a_worker_stops_while_it_imports(
    launcher: Launcher, default_model_folder: Path, delay_s: float
) -> None:
    worker = launcher.xllm(*ALONE, f"--model={default_model_folder}")
    time.sleep(delay_s)
    # Until Python has started there is nobody to answer but the kernel.
    assert worker.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in worker.log
