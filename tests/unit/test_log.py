from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from xllm.log import JsonFormatter, setup_logging


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
