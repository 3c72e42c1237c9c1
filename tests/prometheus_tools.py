"""A real Prometheus for tests, and its promtool."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from tests.missing import skip_or_fail

ROOT = Path(__file__).parents[1]

FETCH_S = 90
"""For a package that is not there yet."""

_METRIC = re.compile(r"\b(?:xllm|process)_\w+")


def prometheus_folder() -> Path:
    """Where `prometheus` and `promtool` are. Without them the test is skipped, but not with
    CI=true: there they have to be."""
    folder, reason = _find()
    if folder is None:
        skip_or_fail(reason)
    return folder


@cache
def _find() -> tuple[Path | None, str]:
    """The folder, or why there is none."""
    try:
        found = subprocess.run(
            [ROOT / "scripts" / "prometheus"], capture_output=True, text=True, timeout=FETCH_S
        )
    except subprocess.TimeoutExpired:
        return None, f"no Prometheus: could not be fetched within {FETCH_S} s"
    if found.returncode:
        return None, f"no Prometheus: {found.stderr.strip() or found.returncode}"
    return Path(found.stdout.strip()), ""


def metric_names(expression: str) -> set[str]:
    """Those of xllm and of its processes that a query asks for."""
    # What is in quotes are label values, and what is in braces before `=` label names.
    return set(_METRIC.findall(re.sub(r'"[^"]*"', "", expression)))


def get_json(url: str, **parameters: str) -> Any:
    """The data of an answer of Prometheus' API. Raises: HTTPError, with the reason as body."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}?{query}", timeout=30) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return answer["data"]
