#!/usr/bin/env python3
"""Draws docs/data/figures.json as docs/pictures/plot-*.svg. A test compares them.

Pictures without a library, so that they are the same on every machine: a figure has groups of bars,
or lines over `x`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
DATA = DOCS / "data" / "figures.json"
PICTURES = DOCS / "pictures"

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 58, 52
COLORS = ("#00897b", "#fb8c00", "#5c6bc0", "#8d6e63")
NUM_TICKS = 5


def draw_all() -> dict[str, str]:
    """SVG by file name."""
    figures = json.loads(DATA.read_text())
    return {f"plot-{name}.svg": draw(figure) for name, figure in figures.items()}


def draw(figure: dict[str, Any]) -> str:
    series: dict[str, list[float]] = figure.get("bars") or figure["lines"]
    labels: list[str] = figure.get("groups") or figure["x"]
    scale = _Scale(max(map(max, series.values())), is_log=figure.get("log", False))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img" '
        f'aria-label="{figure["title"]}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fafafa"/>',
        f'<text x="{LEFT}" y="22" font-size="15" fill="#263238">{figure["title"]}</text>',
        *_legend(list(series)),
        *_axes(scale, labels, figure.get("x_title", "")),
        *(_bars if "bars" in figure else _lines)(series, len(labels), scale),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale:
    """From a value to a height on the page."""

    def __init__(self, largest: float, *, is_log: bool) -> None:
        self._is_log = is_log
        if is_log:
            self.top = 10.0 ** math.ceil(math.log10(largest))
            self.ticks = [10.0**n for n in range(round(math.log10(self.top)) + 1)]
        else:
            step = _round_up(largest / NUM_TICKS)
            self.ticks = [step * n for n in range(math.ceil(largest / step) + 1)]
            self.top = self.ticks[-1]

    def y(self, value: float) -> float:
        share = math.log10(max(value, 1)) / math.log10(self.top) if self._is_log else 0.0
        if not self._is_log:
            share = value / self.top
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def _legend(names: list[str]) -> list[str]:
    parts = []
    for number, name in enumerate(names if len(names) > 1 else []):
        x = LEFT + 130 * number
        parts.append(f'<rect x="{x}" y="33" width="12" height="12" fill="{COLORS[number]}"/>')
        parts.append(f'<text x="{x + 18}" y="44" fill="#455a64">{name}</text>')
    return parts


def _axes(scale: _Scale, labels: list[str], title: str) -> list[str]:
    parts = []
    for tick in scale.ticks:
        y = f"{scale.y(tick):.1f}"
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#e0e0e0"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end" fill="#616161">{tick:,g}</text>'
        )
    for number, label in enumerate(labels):
        x = f"{_center(number, len(labels)):.1f}"
        parts.append(
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" fill="#455a64">'
            f"{label}</text>"
        )
    if title:
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle" '
            f'fill="#616161">{title}</text>'
        )
    return parts


def _center(number: int, count: int) -> float:
    return LEFT + (number + 0.5) * (WIDTH - LEFT - RIGHT) / count


def _bars(series: dict[str, list[float]], count: int, scale: _Scale) -> list[str]:
    parts = []
    width = min(70.0, 0.7 * (WIDTH - LEFT - RIGHT) / count / len(series))
    for index, values in enumerate(series.values()):
        for number, value in enumerate(values):
            x = _center(number, count) + (index - len(series) / 2) * width
            y = scale.y(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{COLORS[index]}"/>'
            )
            parts.append(
                f'<text x="{x + width / 2 - 1:.1f}" y="{y - 4:.1f}" text-anchor="middle" '
                f'font-size="12" fill="#263238">{value:,g}</text>'
            )
    return parts


def _lines(series: dict[str, list[float]], count: int, scale: _Scale) -> list[str]:
    parts = []
    for index, values in enumerate(series.values()):
        points = [(_center(n, count), scale.y(value)) for n, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLORS[index]}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLORS[index]}"/>' for x, y in points
        ]
    return parts


def main() -> None:
    for name, picture in draw_all().items():
        (PICTURES / name).write_text(picture)


if __name__ == "__main__":
    main()
