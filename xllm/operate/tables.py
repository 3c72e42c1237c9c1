"""Answers of an operator port as tables. Pure: JSON in, what rich can print out.

Names and messages come from other processes: they are shown as text, without control characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

TIERS = ("device", "host", "disk")
TIER_STYLES = {"device": "green", "host": "magenta", "disk": "yellow", "remote": "bright_magenta"}
STATE_STYLES = {"ready": "green", "done": "green", "draining": "yellow", "suspect": "yellow"}
BAR_CELLS = 10
WIDE = 140
"""Columns from which on a worker's line has all that there is."""


_COLUMNS = (
    *("worker", "state", "model", "run", "wait", "queue", "prefill"),
    *(*TIERS, "moves/s"),
)
_WIDE_ONLY = frozenset({"model", "prefill", "moves/s"})
_WHOLE = frozenset({"worker", "master", "state", *TIERS})
"""Columns that are not broken up, as long as there is room."""


def plain(text: object, style: str = "") -> Text:
    """`text` as it is: no markup, no escape sequences."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return Text(shown, style=style)


def cluster_view(
    cluster: Mapping[str, Any],
    moved_per_s: Mapping[str, Mapping[str, float]] | None = None,
    width: int = WIDE,
) -> RenderableType:
    """The answer of /admin/cluster, in so many columns. `moved_per_s`: blocks by worker and way."""
    parts: list[RenderableType] = [_headline(cluster)]
    if serving := _serving_line(cluster.get("serving") or {}):
        parts.append(serving)
    parts += [_masters(cluster), _workers(cluster, moved_per_s or {}, width < WIDE)]
    return Group(*parts)


def answers_view(answer: Mapping[str, Any]) -> RenderableType:
    """What each worker said to a command."""
    workers: Mapping[str, Mapping[str, Any]] = answer.get("workers", {})
    columns = sorted({name for said in workers.values() for name in said} - {"state", "error"})
    table = _table("worker", "state", *(name.replace("_", " ") for name in columns))
    for worker_id, said in sorted(workers.items()):
        cells = [_value(said.get(name)) for name in columns]
        state = plain(said["state"], STATE_STYLES.get(said["state"], "red"))
        if said.get("error"):
            state.append_text(plain(f": {said['error']}"))
        table.add_row(plain(worker_id), state, *cells)
    parts: list[RenderableType] = [table]
    if "prompt_tokens" in answer:
        text = f"{answer['prompt_tokens']} tokens in the prompt"
        if "source" in answer:
            text += f", from {answer['source']}"
        parts.insert(0, plain(text, "dim"))
    return Group(*parts)


def seconds(value: float | None) -> str:
    """For people."""
    if value is None:
        return "-"
    if value < 0.9995:
        return f"{value * 1e3:.1f} ms" if value < 0.00995 else f"{value * 1e3:.0f} ms"
    return f"{value:.1f} s"


def bar(used: float, total: float, style: str, num_cells: int = BAR_CELLS) -> Text:
    """`used` of `total`, as that many cells and in figures."""
    full = round(num_cells * used / total) if total else 0
    text = Text("█" * full, style=style)
    text.append("░" * (num_cells - full), style="dim")
    text.append(" " if num_cells else "")
    return text.append(f"{used:g}/{total:g}", style="default" if num_cells else style)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    return table


def _headline(cluster: Mapping[str, Any]) -> Text:
    etcd = cluster["etcd"]
    text = plain(f"xllm {cluster['namespace']}", "bold")
    text.append_text(plain(f"  answered by {cluster['answered_by']}  "))
    is_connected = etcd["connected"]
    text.append("etcd ok" if is_connected else "etcd away", "green" if is_connected else "red")
    return text


def _serving_line(serving: Mapping[str, Any]) -> Text | None:
    if not serving:
        return None
    ttft, tbt = serving["ttft_s"], serving["tbt_s"]
    asked = serving["prompt_tokens"]
    cached = serving["cached_tokens_by_tier"]
    text = Text(
        f"TTFT {seconds(ttft['p50'])}, p95 {seconds(ttft['p95'])}   "
        f"TBT {seconds(tbt['p50'])}, p99 {seconds(tbt['p99'])}   "
        f"{serving['requests']} requests in {serving['seconds'] / 60:.1f} min   found "
    )
    text.append(f"{sum(cached.values()) / asked:.0%}" if asked else "-", "bold")
    for tier, num_tokens in cached.items():
        if num_tokens:
            name = "peer" if tier == "remote" else tier
            text.append(f" {name} {num_tokens / asked:.0%}", TIER_STYLES.get(tier, ""))
    return text


def _masters(cluster: Mapping[str, Any]) -> Table:
    table = _table("master", "", "operators")
    for master in cluster["masters"]:
        leads = Text("leads", "bold cyan") if master["is_leader"] else Text("")
        table.add_row(plain(master["master_id"]), leads, plain(master["operator_address"]))
    return table


def _workers(
    cluster: Mapping[str, Any], moved_per_s: Mapping[str, Mapping[str, float]], is_narrow: bool
) -> RenderableType:
    if not cluster["workers"]:
        return Text("no worker is registered", "dim")
    names = [name for name in _COLUMNS if not (is_narrow and name in _WIDE_ONLY)]
    table = _table(*names)
    num_cells = 0 if is_narrow else BAR_CELLS
    for worker in cluster["workers"]:
        load = worker["load"] or {}
        tiers = worker["tiers"]
        cells: dict[str, Text | str] = {
            "worker": plain(worker["worker_id"]),
            "state": plain(worker["state"], STATE_STYLES.get(worker["state"], "red")),
            "model": plain(worker["model"]),
            "run": str(load.get("running_requests", "-")),
            "wait": str(load.get("waiting_requests", "-")),
            "queue": seconds(load.get("queue_s")),
            "prefill": f"{load.get('prefill_tokens_per_s', 0):.0f} tok/s",
            "moves/s": _moves(moved_per_s.get(worker["worker_id"], {})),
        }
        for tier in TIERS:
            cells[tier] = _tier(tiers.get(tier, {}), TIER_STYLES[tier], num_cells)
        table.add_row(*(cells[name] for name in names))
    return table


def _tier(usage: Mapping[str, Any], style: str, num_cells: int) -> Text:
    if "total_blocks" not in usage:
        return Text("-", "dim")
    return bar(usage["used_blocks"], usage["total_blocks"], style, num_cells)


def _moves(per_s: Mapping[str, float]) -> Text:
    text = Text()
    for way, rate in sorted(per_s.items()):
        direction, _, tier = way.partition("_")
        arrow = "↑" if direction == "from" else "↓"
        style = TIER_STYLES.get("remote" if tier == "peer" else tier, "")
        text.append_text(plain(f"{arrow}{tier} {rate:.0f} ", style))
    return text


def _value(value: object) -> Text:
    if isinstance(value, Mapping):
        return plain(", ".join(f"{name} {count}" for name, count in value.items()) or "-")
    return plain("-" if value is None else value)
