"""`xllm top`: the cluster in a terminal, until `q` or Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from xllm.operate.operator_client import NoAnswer, OperatorClient
from xllm.operate.tables import cluster_view, plain

Moved = dict[str, dict[str, float]]


class Screen:
    """What is shown now, and from one answer to the next how many blocks moved. Pure."""

    def __init__(self) -> None:
        self._cluster: Mapping[str, Any] | None = None
        self._at = 0.0
        self._moved: Moved = {}
        self._problem = ""

    def take(self, cluster: Mapping[str, Any], at: float) -> None:
        """`at`: seconds, of any clock that does not go back."""
        if self._cluster is not None and at > self._at:
            self._moved = moved_per_s(self._cluster, cluster, at - self._at)
        self._cluster, self._at, self._problem = cluster, at, ""

    def fail(self, problem: str) -> None:
        """The port does not answer: what it said last stays."""
        self._problem = problem

    def render(self, width: int) -> RenderableType:
        parts: list[RenderableType] = []
        if self._problem:
            parts.append(plain(self._problem, "bold red"))
        if self._cluster is not None:
            parts.append(cluster_view(self._cluster, self._moved, width))
        parts.append(Text("q ends", "dim"))
        return Group(*parts)


def moved_per_s(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> Moved:
    """Blocks by worker and way; without those that did not move."""
    counts = {worker["worker_id"]: _counts(worker) for worker in before["workers"]}
    moved: Moved = {}
    for worker in now["workers"]:
        old = counts.get(worker["worker_id"])
        if old is None:
            continue
        steps = {way: total - old.get(way, 0) for way, total in _counts(worker).items()}
        moved[worker["worker_id"]] = {w: step / seconds for w, step in steps.items() if step > 0}
    return moved


def run_top(client: OperatorClient, console: Console, period_s: float) -> None:
    """Raises: ConfigError, NoAnswer if the port does not answer at first."""
    screen = Screen()
    screen.take(client.get("/admin/cluster"), time.monotonic())
    first = screen.render(console.width)
    with (
        _keys(sys.stdin.fileno()) as wait_for_key,
        Live(first, console=console, screen=True, auto_refresh=False) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        live.refresh()
        while wait_for_key(period_s) not in (b"q", b"Q"):
            try:
                screen.take(client.get("/admin/cluster"), time.monotonic())
            except NoAnswer as error:
                screen.fail(str(error))
            live.update(screen.render(console.width), refresh=True)


@contextlib.contextmanager
def _keys(fd: int) -> Iterator[Callable[[float], bytes]]:
    """A function that waits so many seconds for a key, and returns it or nothing."""

    def wait(timeout_s: float) -> bytes:
        ready, _, _ = select.select([fd], [], [], timeout_s)
        return os.read(fd, 1) if ready else b""

    def sleep(timeout_s: float) -> bytes:
        time.sleep(timeout_s)
        return b""

    if not os.isatty(fd):
        yield sleep
        return
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _counts(worker: Mapping[str, Any]) -> Mapping[str, int]:
    counts: Mapping[str, int] = (worker["load"] or {}).get("moved_blocks", {})
    return counts
