from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from xllm.telemetry import JsonFormatter, Metrics, measure_event_loop_lag, setup_logging


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    own_level = logging.getLogger("xllm").level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("xllm").setLevel(own_level)


def test_text_line_has_utc_time_level_logger_and_event(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", "text")
    logging.getLogger("xllm.roles.worker").info("worker_ready worker_id=%s", "a:1")

    line = capsys.readouterr().err
    time, rest = line.split(" ", 1)
    assert rest == "INFO xllm.roles.worker worker_ready worker_id=a:1\n"
    assert len(time) == len("2026-01-31T12:00:00.000Z")
    assert time.endswith("Z")


def test_setting_up_twice_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", "json")
    setup_logging("info", "text")
    logging.getLogger("xllm.main").info("started")

    assert capsys.readouterr().err.count("started") == 1


def test_level_is_for_xllm_and_access_lines_stay_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("debug", "text")
    logging.getLogger("xllm.engine").debug("step")
    logging.getLogger("aiohttp.access").info("GET /health")
    logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("somebody.else").warning("important")

    err = capsys.readouterr().err
    assert "step" in err
    assert "important" in err
    assert "GET /health" not in err
    assert "chatter" not in err


def test_a_line_break_in_a_value_cannot_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", "text")
    logging.getLogger("xllm.api").info("refused request_id=%s", "x\nINFO forged")

    assert capsys.readouterr().err.count("\n") == 1


def _as_json(message: str, exc_info: BaseException | None = None) -> dict[str, str]:
    record = logging.LogRecord("xllm.a", logging.WARNING, "f.py", 1, message, (), None)
    if exc_info is not None:
        record.exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    fields: dict[str, str] = json.loads(JsonFormatter().format(record))
    fields.pop("time")
    assert fields.pop("level") == "warning"
    assert fields.pop("logger") == "xllm.a"
    return fields


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("ready", {"event": "ready"}),
        ("ready worker_id=a:1 blocks=3", {"event": "ready", "worker_id": "a:1", "blocks": "3"}),
        ('lost reason="connection \\"x\\" reset" n=1', {"reason": 'connection "x" reset'}),
        ("lost reason='not found'", {"event": "lost", "reason": "not found"}),
        ("lost reason= n=1", {"event": "lost", "reason": "", "n": "1"}),
        ("waiting for etcd", {"message": "waiting for etcd"}),
        ("lost reason=two words", {"message": "lost reason=two words"}),
    ],
)
def test_json_fields(message: str, fields: dict[str, str]) -> None:
    assert fields.items() <= _as_json(message).items()


def test_json_line_cannot_be_misled_by_its_own_keys() -> None:
    assert _as_json("ready level=debug logger=x event=y") == {"event": "ready"}


def test_json_carries_the_traceback() -> None:
    assert "ValueError: boom" in _as_json("failed", ValueError("boom"))["exception"]


def _families(metrics: Metrics) -> set[str]:
    text = metrics.render().decode()
    return {family.name for family in text_string_to_metric_families(text)}


def test_metrics_of_two_processes_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.prompt_tokens.inc(5)

    assert b"xllm_prompt_tokens_total 5.0" in one.render()
    assert b"xllm_prompt_tokens_total 0.0" in other.render()


def test_all_names_have_the_prefix_and_those_of_vllm_are_kept() -> None:
    names = {name for name in _families(Metrics()) if not name.startswith("process_")}

    assert all(name.startswith("xllm_") for name in names)
    assert names >= {
        "xllm_num_requests_running",
        "xllm_num_requests_waiting",
        "xllm_kv_cache_usage_perc",
        "xllm_prefix_cache_queries",
        "xllm_prefix_cache_hits",
        "xllm_num_preemptions",
        "xllm_time_to_first_token_seconds",
        "xllm_inter_token_latency_seconds",
        "xllm_e2e_request_latency_seconds",
    }


def test_a_role_renders_only_its_concerns() -> None:
    metrics = Metrics(engine=False)
    metrics.kv_cache_usage_perc.set(0.5)

    assert "xllm_kv_cache_usage_perc" not in _families(metrics)
    assert "xllm_workers" in _families(metrics)


async def test_event_loop_lag_is_measured() -> None:
    metrics = Metrics()
    observed = asyncio.Event()
    histogram = metrics.event_loop_lag_seconds
    metrics.event_loop_lag_seconds = SimpleNamespace(  # type: ignore[assignment]
        observe=lambda lag_s: (histogram.observe(lag_s), observed.set())
    )
    async with asyncio.timeout(1):
        task = asyncio.create_task(measure_event_loop_lag(metrics, period_s=0.0))
        await observed.wait()
    task.cancel()

    assert b"xllm_event_loop_lag_seconds_count 0.0" not in metrics.render()
