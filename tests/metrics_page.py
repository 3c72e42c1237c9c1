"""docs/metrics.md as data, what a process exports in the same form, and one sample of it."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

_ROW = re.compile(
    r"\| `(?P<name>xllm_\w+)` \| (?P<type>\w+) \| (?P<labels>.*?) ?"
    r"\| (?P<unit>.*?) ?\| (?P<what>.*?) \| .* \| .* \|"
)


class Row(NamedTuple):
    """One metric, under the name that queries use; a histogram without its suffixes."""

    name: str
    type: str
    labels: tuple[str, ...]
    what: str


def documented() -> dict[str, list[Row]]:
    """The rows by section of the page."""
    sections: dict[str, list[Row]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            rows = sections[line[3:]] = []
        elif line.startswith("| `xllm_"):
            found = _ROW.fullmatch(line)
            assert found is not None, f"not a row of docs/metrics.md: {line}"
            labels = tuple(re.findall(r"`(\w+)`", found["labels"]))
            rows.append(Row(found["name"], found["type"], labels, found["what"]))
    return {title: rows for title, rows in sections.items() if rows}


def query_name(family: str, kind: str) -> str:
    """As a query has it: the parser takes the suffix off."""
    return f"{family}_total" if kind == "counter" else family


def exported(exposition: str) -> dict[str, str]:
    """Type of each metric of a process by its name, those of the process collector left out."""
    return {
        query_name(family.name, family.type): family.type
        for family in text_string_to_metric_families(exposition)
        if not family.name.startswith("process_") and not family.name.endswith("_created")
    }


def metric(operator_url: str, name: str) -> float | None:
    """One sample by its name with labels; None while nothing answers."""
    try:
        with urllib.request.urlopen(f"{operator_url}/metrics", timeout=5) as response:
            text = response.read().decode()
    except OSError:
        return None
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found is not None else None
