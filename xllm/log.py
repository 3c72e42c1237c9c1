"""The log of a process: lines on stderr, as text or as JSON.

A line is `event key=value ...`: the event's name is one word, values with spaces are quoted. As
text it stays like that, after time, level and logger; as JSON, event and keys become fields of one
object. Nothing here samples or sends.
"""

from __future__ import annotations

import logging
import re
import sys
import time

import orjson

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

_VALUE = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s"']\S*|"""
_PAIR = re.compile(rf" (\w+)=({_VALUE})(?= |$)")
_EVENT = re.compile(rf"\w+(?: \w+=(?:{_VALUE})(?= |$))*")


def setup_logging(level: str = "info", fmt: str = "text") -> None:
    """Sends the log of this process to stderr; a second call replaces the first.

    `level` is for xllm's own loggers; other packages' lines show from WARNING on.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _StderrHandler):
            root.removeHandler(handler)
    stderr_handler = _StderrHandler()
    stderr_handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    root.addHandler(stderr_handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("xllm").setLevel(level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A type of its own, so that `setup_logging` never removes somebody else's handler."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)


def _utc_time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO xllm.roles.worker event key=value`, then any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        # A client chooses some of the values: a line break in one must not forge a second line.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_utc_time(record)} {record.levelname} {record.name} {message}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, event and its keys; traceback as `exception`.

    A message that is not of the form `event key=value ...` is whole under `message`.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        fields: dict[str, str] = {}
        if _EVENT.fullmatch(message):
            event, _, _ = message.partition(" ")
            fields = {key: _unquote(value) for key, value in _PAIR.findall(message)}
            fields["event"] = event
        else:
            fields["message"] = message
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        fields |= {
            "time": _utc_time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS).decode()


def _unquote(value: str) -> str:
    if value[:1] in ("'", '"'):
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value
