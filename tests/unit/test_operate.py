"""Answers as tables: what a terminal shows, and that nothing in them can write to it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from xllm.operate.command_line import run_command
from xllm.operate.tables import answers_view, cluster_view
from xllm.operate.top import Screen, moved_per_s


def shown(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), record=True, width=160)
    console.print(view)
    return console.export_text()


def worker(worker_id: str = "10.0.0.1:8010", **moved: int) -> dict[str, Any]:
    return {
        "worker_id": worker_id,
        "state": "ready",
        "model": "m",
        "tiers": {
            "device": {"used_blocks": 30, "total_blocks": 60, "indexed_blocks": 30},
            "host": {"used_blocks": 5, "total_blocks": 100},
            "disk": {"indexed_blocks": 3},
        },
        "load": {
            "running_requests": 2,
            "waiting_requests": 1,
            "queue_s": 0.25,
            "prefill_tokens_per_s": 1234.5,
            "moved_blocks": moved,
        },
    }


def cluster(*workers: dict[str, Any]) -> dict[str, Any]:
    return {
        "namespace": "default",
        "answered_by": "10.0.0.9:8888",
        "leader": "10.0.0.9:8888",
        "etcd": {"connected": True},
        "masters": [
            {
                "master_id": "10.0.0.9:8888",
                "is_leader": True,
                "operator_address": "10.0.0.9:8889",
            }
        ],
        "workers": list(workers),
        "serving": {
            "seconds": 120.0,
            "requests": 7,
            "ttft_s": {"p50": 0.0123, "p95": 1.5, "num": 7},
            "tbt_s": {"p50": 0.03, "p99": None, "num": 0},
            "prompt_tokens": 1000,
            "cached_tokens_by_tier": {"device": 500, "host": 0, "disk": 0, "remote": 250},
        },
    }


def test_the_cluster_in_one_look() -> None:
    text = shown(cluster_view(cluster(worker()), {"10.0.0.1:8010": {"to_host": 12.4}}))
    for part in (
        *("xllm default", "answered by 10.0.0.9:8888", "etcd ok", "leads"),
        *("10.0.0.1:8010", "ready", "250 ms", "1234 tok/s", "█████░░░░░ 30/60", "5/100"),
        *("↓host 12", "TTFT 12 ms, p95 1.5 s", "p99 -", "75% device 50% peer 25%"),
    ):
        assert part in text
    assert "no worker is registered" in shown(cluster_view(cluster()))
    assert "serving" not in shown(cluster_view(cluster() | {"serving": {}}))


def test_a_narrow_terminal_shows_less_but_no_broken_names() -> None:
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(cluster_view(cluster(worker("192.168.100.100:8010")), width=80))
    text = console.export_text()
    for part in ("192.168.100.100:8010", "ready", "250 ms", "30/60", "5/100"):
        assert part in text
    assert "tok/s" not in text


def test_a_worker_without_a_report_is_shown() -> None:
    silent = worker() | {"load": None, "tiers": {}, "state": "connecting"}
    assert "connecting" in shown(cluster_view(cluster(silent)))


def test_what_workers_answered() -> None:
    answer = {
        "prompt_tokens": 100,
        "workers": {
            "a": {"state": "done", "matched_tokens": 96, "held": {"device": 96, "host": 32}},
            "b": {"state": "failed", "error": "no room"},
        },
        "complete": False,
    }
    text = shown(answers_view(answer))
    for part in ("100 tokens", "matched tokens", "device 96, host 32", "failed: no room"):
        assert part in text


def test_names_cannot_write_to_the_terminal() -> None:
    bad = "\x1b[2J\x07[red]evil"
    text = shown(cluster_view(cluster(worker(bad))))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]evil" in text


def test_moves_are_counted_from_one_look_to_the_next() -> None:
    before = cluster(worker("a", to_host=10, from_disk=3), worker("gone", to_host=9))
    now = cluster(worker("a", to_host=30, from_disk=3, to_peer=4), worker("new", to_host=7))
    assert moved_per_s(before, now, 2.0) == {"a": {"to_host": 10.0, "to_peer": 2.0}}
    restarted = cluster(worker("a", to_host=1))
    assert moved_per_s(now, restarted, 1.0) == {"a": {}}


def test_a_screen_keeps_what_it_knew_when_nobody_answers() -> None:
    screen = Screen()
    screen.take(cluster(worker()), 1.0)
    screen.fail("http://x does not answer")
    text = shown(screen.render(160))
    assert "does not answer" in text
    assert "10.0.0.1:8010" in text
    screen.take(cluster(worker()), 2.0)
    assert "does not answer" not in shown(screen.render(160))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["cache", "lookup"], "give the prompt as TEXT, --file or --token_ids"),
        (["cache", "lookup", "a", "--token_ids=1"], "give the prompt as"),
        (["cache", "pin", "--token_ids=1,x"], "--token_ids: expected numbers"),
        (["cache", "unpin", "--file=/nowhere/at/all"], "--file=/nowhere/at/all"),
        (["cluster", "--operator=ftp://x"], "--operator=ftp://x: expected http://host:port"),
        (["cluster", "--operator_key_file=/nowhere"], "operator_key_file"),
        (["cache", "clear", "--tier=tape"], "invalid choice: 'tape'"),
        (["drain"], "WORKER"),
        (["cache", "move", "x"], "--to"),
        (["cache", "pin", "x", "--ttl=-1"], "--ttl"),
    ],
)
def test_what_cannot_be_is_refused_before_anybody_is_asked(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(argv) == 2
    assert reason in capsys.readouterr().err
