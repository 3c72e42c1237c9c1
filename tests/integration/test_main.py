"""The supervisor in real processes, with a role that misbehaves as each test needs."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from xllm.main import EXIT_CONFIG, EXIT_ERROR, EXIT_ETCD, EXIT_OK

_PROGRAM = """
import asyncio, ctypes, signal, subprocess, sys, threading, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
import xllm.main
from xllm.errors import ConfigError, EtcdUnavailable

def say(line):
    print(line, flush=True)

{role}

def load(config, reload):
    reload.add("keys", lambda: say("read again"))
    if "load" in globals().get("slow", ""):
        say("ready")
        time.sleep(60)
    return run

xllm.main._load_role = load
xllm.main.STOP_DEADLINE_S = {deadline}
sys.argv = ["xllm", *{flags!r}]
xllm.main.main()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process whose role is the given source of `async def run()`."""
    started: list[subprocess.Popen[str]] = []

    def start_role(
        role: str,
        deadline_s: float = 4.5,
        flags: Sequence[str] = ("--role=master", "--drain_timeout=0"),
    ) -> subprocess.Popen[str]:
        program = _PROGRAM.format(role=textwrap.dedent(role), deadline=deadline_s, flags=flags)
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_role
    for process in started:
        process.kill()
        process.communicate()


def _end(process: subprocess.Popen[str], timeout_s: float = 5.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def _await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


SERVES = """
async def run():
    try:
        say("ready")
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.01)
        say("drained")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_role_drain(start: Start, signum: signal.Signals) -> None:
    process = start(SERVES)
    _await_ready(process)
    process.send_signal(signum)
    assert _end(process) == (EXIT_OK, "drained\n", "")


def test_a_worker_that_is_to_drain_for_longer_gets_the_time(start: Start) -> None:
    role = SERVES.replace("sleep(0.01)", "sleep(0.6)")
    process = start(role, deadline_s=0.1, flags=("--role=worker", "--drain_timeout=0.5"))
    _await_ready(process)
    process.send_signal(signal.SIGTERM)
    assert _end(process) == (EXIT_OK, "drained\n", "")


def test_sighup_reads_keys_again_and_a_later_one_does_not_cut_a_drain_short(start: Start) -> None:
    role = SERVES.replace("sleep(0.01)", "sleep(0.3)").replace(
        "finally:", "finally:\n        say('ends')"
    )
    process = start(role, flags=("--role=master", "--api_keys_file=keys"))
    _await_ready(process)
    assert process.stdout is not None
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "read again\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ends\n"
    process.send_signal(signal.SIGHUP)
    assert _end(process)[:2] == (EXIT_OK, "drained\n")


def test_sighup_ends_a_process_that_has_nothing_to_read_again(start: Start) -> None:
    process = start(SERVES)
    _await_ready(process)
    process.send_signal(signal.SIGHUP)
    assert _end(process)[0] == -signal.SIGHUP


def test_a_role_that_returns_is_a_clean_end(start: Start) -> None:
    assert _end(start("async def run():\n    say('done')")) == (EXIT_OK, "done\n", "")


@pytest.mark.parametrize(
    ("raised", "exit_code", "line"),
    [
        ("ConfigError('--port=1: is\\ntaken')", EXIT_CONFIG, "xllm: --port=1: is taken\n"),
        ("EtcdUnavailable('no etcd')", EXIT_ETCD, "xllm: no etcd\n"),
        (
            "ExceptionGroup('g', [ExceptionGroup('h', [ConfigError('x')])])",
            EXIT_CONFIG,
            "xllm: x\n",
        ),
        ("ExceptionGroup('g', [OSError(1), EtcdUnavailable('x')])", EXIT_ETCD, "xllm: x\n"),
    ],
)
def test_an_error_of_the_operator_is_one_line(
    start: Start, raised: str, exit_code: int, line: str
) -> None:
    assert _end(start(f"async def run():\n    raise {raised}")) == (exit_code, "", line)


def test_a_defect_shows_its_traceback(start: Start) -> None:
    exit_code, _, err = _end(start("async def run():\n    raise KeyError('x')"))
    assert exit_code == EXIT_ERROR
    assert "role_failed" in err
    assert "KeyError: 'x'" in err


@pytest.mark.parametrize("raised", ["SystemExit(0)", "asyncio.CancelledError()"])
def test_an_end_that_nobody_asked_for_is_an_error(start: Start, raised: str) -> None:
    exit_code, _, err = _end(start(f"async def run():\n    raise {raised}"))
    assert exit_code == EXIT_ERROR
    assert "role_failed" in err


@pytest.mark.parametrize(
    "role",
    [
        pytest.param(
            "async def run():\n    say('ready')\n    time.sleep(60)", id="loop-blocked-in-a-call"
        ),
        pytest.param(
            "async def run():\n    say('ready')\n    while True:\n        pass", id="loop-spins"
        ),
        pytest.param(
            """
            async def run():
                say("ready")
                while True:
                    try:
                        await asyncio.sleep(60)
                    except asyncio.CancelledError:
                        pass
            """,
            id="cancellation-ignored",
        ),
    ],
)
def test_what_does_not_drain_ends_at_the_deadline(start: Start, role: str) -> None:
    process = start(role, deadline_s=0.2)
    _await_ready(process)
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == EXIT_OK


def test_a_thread_that_hangs_does_not_delay_the_end(start: Start) -> None:
    process = start(
        """
        async def run():
            say("ready")
            await asyncio.to_thread(time.sleep, 60)
        """,
        deadline_s=60,
    )
    _await_ready(process)
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == EXIT_OK


def test_an_import_that_takes_long_is_not_waited_for(start: Start) -> None:
    process = start("slow = 'load'\nrun = None", deadline_s=60)
    _await_ready(process)
    process.send_signal(signal.SIGINT)
    assert _end(process)[0] == EXIT_OK


def test_a_second_signal_ends_at_once(start: Start) -> None:
    process = start(
        """
        async def run():
            say("ready")
            try:
                await asyncio.sleep(60)
            finally:
                say("ready")
                await asyncio.sleep(60)
        """,
        deadline_s=60,
    )
    for _ in range(2):
        _await_ready(process)
        process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == EXIT_OK


def test_no_child_outlives_a_forced_end(start: Start) -> None:
    process = start(
        """
        async def run():
            child = subprocess.Popen(["sleep", "60"])
            say("ready")
            child.wait()
        """,
        deadline_s=0.2,
    )
    _await_ready(process)
    process.send_signal(signal.SIGTERM)
    # The child holds our end of the pipes: communicate would wait for it.
    assert _end(process)[0] == EXIT_OK


def test_a_signal_before_anything_has_begun(start: Start) -> None:
    """At any moment: from the start of the interpreter on, in steps."""
    role = SERVES
    for delay_s in (0.1, 0.15, 0.2):
        process = start(role)
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        exit_code, _, err = _end(process)
        assert "Traceback" not in err
        # The kernel's default applies until the handlers are there.
        assert exit_code in (EXIT_OK, -signal.SIGTERM)


def test_a_master_does_not_load_torch() -> None:
    """Nor through the packages it uses, which test_imports.py does not see into."""
    program = "import sys, xllm.roles.master; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
