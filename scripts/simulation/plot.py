"""The figures of all runs as one picture; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Of one run, as they are in the JSON file."""


def draw(figures: Sequence[Figures], path: Path) -> None:
    """A column per cluster: TTFT, reuse, what etcd gets, what a route costs the master."""
    from matplotlib import pyplot

    groups = sorted({(f["workers"], f["tiers"]) for f in figures})
    grid, axes = pyplot.subplots(
        4, len(groups), figsize=(2.6 * len(groups), 10), squeeze=False, sharex="col", sharey="row"
    )
    for column, (workers, tiers) in enumerate(groups):
        chosen = [f for f in figures if (f["workers"], f["tiers"]) == (workers, tiers)]
        names = [f["policy"] for f in chosen]
        ttft, reuse, etcd, route = axes[:, column]
        ttft.set_title(f"{workers} workers\ntiers: {tiers}", fontsize=9)
        for quantile, marker in (("0.5", "v"), ("0.9", "o"), ("0.99", "^")):
            values = [f["ttft_s"][quantile] for f in chosen]
            ttft.plot(names, values, marker, label=f"p{float(quantile) * 100:g}")
        ttft.plot(names, [f["mean_ttft_s"] for f in chosen], "k_", markersize=12, label="mean")
        ttft.set_yscale("log")
        reuse.bar(names, [f["reuse"] for f in chosen])
        reuse.axhline(chosen[0]["pooled_reuse"], color="k", linewidth=0.8, linestyle="--")
        etcd.plot(names, [f["puts_per_s"] for f in chosen], "o", label="puts/s")
        etcd.plot(names, [f["bytes_per_s"] / 1e3 for f in chosen], "s", label="kB/s")
        etcd.set_yscale("log")
        route.bar(names, [f["route_p99_s"] * 1e3 for f in chosen])
        route.tick_params(axis="x", rotation=90)
    for axis, label in zip(
        axes[:, 0], ("TTFT, s", "reuse", "to etcd, busiest 10 s", "route p99, ms"), strict=True
    ):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=7)
    axes[2, 0].legend(fontsize=7)
    grid.tight_layout()
    grid.savefig(path, dpi=80)
    pyplot.close(grid)


def draw_rates(figures: Sequence[Figures], path: Path) -> None:
    """TTFT and reuse of each policy over the rate."""
    from matplotlib import pyplot

    grid, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for policy in dict.fromkeys(f["policy"] for f in figures):
        chosen = [f for f in figures if f["policy"] == policy]
        rates = [f["rate"] for f in chosen]
        axes[0].plot(rates, [f["mean_ttft_s"] for f in chosen], marker="o", label=policy)
        axes[1].plot(rates, [f["ttft_s"]["0.9"] for f in chosen], marker="o")
        axes[2].plot(rates, [f["reuse"] for f in chosen], marker="o")
    for axis, label in zip(axes, ("mean TTFT, s", "TTFT p90, s", "reuse"), strict=True):
        axis.set_xlabel("requests/s")
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    grid.tight_layout()
    grid.savefig(path, dpi=80)
    pyplot.close(grid)
