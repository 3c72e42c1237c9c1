"""Rows of a benchmark: printed as a table, written as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure beside what it is measured against, both from the same run.

    `ratio` is what `target` speaks of; `met` compares the two.
    """

    name: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None


def at_least(name: str, value: float, unit: str, reference: float, target: float | None) -> Row:
    """`value / reference` should be at least `target`."""
    return _row(name, value, unit, reference, target, is_upper=False)


def at_most(name: str, value: float, unit: str, reference: float, target: float | None) -> Row:
    """`value / reference` should be at most `target`."""
    return _row(name, value, unit, reference, target, is_upper=True)


def limited(name: str, value: float, unit: str, limit: float) -> Row:
    """`value` itself should be at most `limit`."""
    return Row(
        name=name,
        value=value,
        unit=unit,
        reference=limit,
        ratio=value / limit if limit else None,
        target=f"<= {limit:g} {unit}",
        met=value <= limit,
    )


def plain(name: str, value: float, unit: str) -> Row:
    """A figure without a target."""
    return Row(name=name, value=value, unit=unit)


def _row(
    name: str, value: float, unit: str, reference: float, target: float | None, *, is_upper: bool
) -> Row:
    ratio = value / reference
    if target is None:
        return Row(name=name, value=value, unit=unit, reference=reference, ratio=ratio)
    return Row(
        name=name,
        value=value,
        unit=unit,
        reference=reference,
        ratio=ratio,
        target=f"{'<=' if is_upper else '>='} {target:g} x",
        met=ratio <= target if is_upper else ratio >= target,
    )


def format_table(rows: Sequence[Row]) -> str:
    header = ("name", "value", "unit", "reference", "ratio", "target", "met")
    cells = [header, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.value:.4g}",
        row.unit,
        "" if row.reference is None else f"{row.reference:.4g}",
        "" if row.ratio is None else f"{row.ratio:.3f}",
        row.target,
        "" if row.met is None else ("yes" if row.met else "NO"),
    )


def write_json(rows: Sequence[Row], benchmark: str, path: Path) -> None:
    machine = {"cpu": _cpu_name(), "python": platform.python_version()}
    document = {
        "benchmark": benchmark,
        "unix_time": int(time.time()),
        "machine": machine,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()
