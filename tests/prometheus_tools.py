"""A real Prometheus for tests, and its promtool."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

_METRIC = re.compile(r"\b(?:xllm|process)_\w+")


@cache
def prometheus_folder() -> Path:
    """Where `prometheus` and `promtool` are. Without them the test is skipped, but not with
    CI=true: there they have to be."""
    found = subprocess.run(
        [ROOT / "scripts" / "prometheus"], capture_output=True, text=True, timeout=300
    )
    if found.returncode:
        reason = f"no Prometheus: {found.stderr.strip() or found.returncode}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found.stdout.strip())


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
