"""The `xllm` command: flags → config → the role's coroutine on uvloop → exit code.

    0   a clean stop, after SIGINT or SIGTERM
    2   ConfigError: one line on stderr says what to change
    3   EtcdUnavailable
    1   anything else, with its traceback

The role runs on a thread of its own and the main thread only waits, because Python runs signal
handlers on the main thread, between bytecodes: so a signal is answered at any moment, also while
the role's thread imports torch or sits in a long call. The first signal cancels the role's task,
which drains and returns; `STOP_DEADLINE_S` later (more, if a worker is asked to drain for longer),
or at the second signal, the process ends as it is. It always ends by `os._exit`: a thread that
hangs in a call must not keep it alive. SIGHUP makes a process that was given files of keys or
certificates read them again; others end, as processes do when their terminal goes away.

This module imports next to nothing, so that the handlers are there before anything slow begins.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from xllm.config import MasterConfig, WorkerConfig
    from xllm.reload import Reload

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_CONFIG = 2
EXIT_ETCD = 3

STOP_DEADLINE_S = 4.5
"""From the first signal to the end of the process: 5 s are promised."""

AFTER_DRAIN_S = 1.5
"""Of it, what is left after a drain: the lease is given back, the engine ends its step."""

_ROLE_ENDED = 0
"""No signal has this number."""

_HANGUP = int(signal.SIGHUP)

SWITCH_INTERVAL_S = 0.001
"""Of threads: an event loop must not wait Python's 5 ms for the engine's, or for one that encodes a
prompt."""


def main() -> NoReturn:
    """The console script."""
    supervisor = Supervisor()
    supervisor.install_signal_handlers()
    faulthandler.enable()
    # A process that hangs shows where, and goes on.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _end(supervisor.run(sys.argv[1:]))


class Supervisor:
    """Runs one role on a thread, and ends it on a signal."""

    def __init__(self) -> None:
        self._wake_read, self._wake_write = os.pipe()
        """One byte per event: a signal's number, or `_ROLE_ENDED`. A lock would not do instead: a
        signal that comes just before the main thread blocks on one does not wake it."""
        os.set_blocking(self._wake_write, False)
        self._role_started = False
        self._stop_requested = False
        self._stop_deadline_s = STOP_DEADLINE_S
        self._cancel_role: Callable[[], object] | None = None
        """None until the role's task exists; before that, there is nothing to drain."""
        self._reload: Callable[[], object] = lambda: None
        self._exit_code = EXIT_ERROR

    def install_signal_handlers(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # Later signals are read from the pipe.
        if not self._role_started:
            _end(EXIT_OK)

    def run(self, argv: Sequence[str]) -> int:
        """Runs what `argv` asks for to its end; returns the exit code."""
        from xllm.errors import ConfigError
        from xllm.flags import Answer, parse_command_line

        try:
            config = parse_command_line(argv)
        except ConfigError as error:
            return _refuse(error, EXIT_CONFIG)
        if isinstance(config, Answer):
            print(config.text)
            return EXIT_OK
        drain_timeout_s = getattr(config, "drain_timeout", 0.0)
        self._stop_deadline_s = max(STOP_DEADLINE_S, drain_timeout_s + AFTER_DRAIN_S)
        role = threading.Thread(target=self._run_role, args=(config,), name="role", daemon=True)
        self._role_started = True
        if _reads_again(config):
            signal.signal(signal.SIGHUP, self._on_signal)
        role.start()
        return self._wait()

    def _wait(self) -> int:
        while (event := self._next_event()) == _HANGUP:
            self._reload()
        if event == _ROLE_ENDED:
            return self._exit_code
        self._stop_requested = True
        event = None
        if self._cancel_role is not None:
            self._cancel_role()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            event = self._next_event(self._stop_deadline_s)
        if event != _ROLE_ENDED:
            _terminate_children()
            return EXIT_OK
        # What could not work no longer has to.
        return EXIT_ERROR if self._exit_code == EXIT_ERROR else EXIT_OK

    def _next_event(self, timeout_s: float | None = None) -> int | None:
        """The next byte of the pipe, or None if there is none in time."""
        ready, _, _ = select.select([self._wake_read], [], [], timeout_s)
        return os.read(self._wake_read, 1)[0] if ready else None

    def _run_role(self, config: MasterConfig | WorkerConfig) -> None:
        import asyncio

        try:
            self._serve(config)
            self._exit_code = EXIT_OK
        except BaseException as error:
            # The last frame of the thread: nothing above could tell what ended the process.
            cancelled = isinstance(error, asyncio.CancelledError)
            asked_for = cancelled and self._stop_requested
            self._exit_code = EXIT_OK if asked_for else _exit_code(error)
        os.write(self._wake_write, bytes([_ROLE_ENDED]))

    def _serve(self, config: MasterConfig | WorkerConfig) -> None:
        """Returns when the role's task has ended. Raises: what it raises, CancelledError too."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        import uvloop

        from xllm.reload import Reload
        from xllm.telemetry import setup_logging

        class Executor(ThreadPoolExecutor):
            def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
                """Waits for nothing: a thread may sit in a download or a compiler."""
                super().shutdown(wait=False, cancel_futures=True)

        setup_logging(config.log.log_level, config.log.log_format)
        reload = Reload()
        run_role = _load_role(config, reload)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            loop = runner.get_loop()
            loop.set_default_executor(Executor(thread_name_prefix="blocking"))

            async def serve() -> None:
                task = asyncio.current_task()
                assert task is not None
                self._cancel_role = lambda: loop.call_soon_threadsafe(task.cancel)
                self._reload = lambda: loop.call_soon_threadsafe(reload.run)
                await run_role()

            runner.run(serve())


def _load_role(
    config: MasterConfig | WorkerConfig, reload: Reload
) -> Callable[[], Awaitable[None]]:
    """Imports the role's module, which for a worker takes seconds."""
    from xllm.config import MasterConfig

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if isinstance(config, MasterConfig):
        from xllm.roles.master import run_master

        return lambda: run_master(config, reload)

    from xllm.roles.worker import run_worker

    return lambda: run_worker(config, reload)


def _reads_again(config: MasterConfig | WorkerConfig) -> bool:
    security = config.security
    files = (config.api.api_keys_file, security.operator_key_file, security.tls_cert)
    return any(file is not None for file in files)


def _exit_code(error: BaseException) -> int:
    """Says on stderr what ended the role."""
    from xllm.errors import ConfigError, EtcdUnavailable

    leaves = list(_leaves(error))
    for kind, exit_code in ((ConfigError, EXIT_CONFIG), (EtcdUnavailable, EXIT_ETCD)):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return _refuse(leaf, exit_code)

    import logging

    logging.getLogger(__name__).critical("role_failed", exc_info=error)
    return EXIT_ERROR


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group of groups, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _refuse(error: BaseException, exit_code: int) -> int:
    print(f"xllm: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code


def _terminate_children() -> None:
    """For a process that ends without draining: no download or compiler goes on alone.

    The keeper of an embedded etcd is in a process group of its own and sees to its own end.
    """
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(child.pid) == os.getpgrp():
                child.terminate()


def _end(exit_code: int) -> NoReturn:
    # Whoever read our output may be gone.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
