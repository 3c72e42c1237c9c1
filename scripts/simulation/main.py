"""Options, runs, table and plot of `scripts/simulate`."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.trace import CONVERSATION

from simulation.cluster import Cluster
from simulation.policies import ROUTINGS
from simulation.summary import Summary
from simulation.trace import Arrival, pooled_reuse, read_arrivals
from simulation.worker import RATES_FILE, Rates, read_rates

TIERS = {"device": (("device", 1),), "all": (("device", 1), ("host", 2), ("disk", 4))}
"""Each tier's blocks, in those of the device."""

HEADER = (
    "policy",
    "mean s",
    "p50 s",
    "p90 s",
    "p99 s",
    "reuse %",
    "of pool",
    "vs RR %",
    "puts/s",
    "MB/s",
    "index MB",
    "apply s",
    "route ms",
    "p99 ms",
    "|error| s",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, default=CONVERSATION)
    parser.add_argument("--rates", type=Path, default=RATES_FILE)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--policies", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--speedup", type=float, default=1.0, help="of the trace's clock")
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")


def run(options: argparse.Namespace) -> None:
    rates = read_rates(options.rates)
    arrivals = read_arrivals(options.trace, rates.block_size, options.speedup)[: options.requests]
    print(f"rates: {rates.source}\n")
    figures: list[dict[str, object]] = []
    for num_workers in options.workers:
        pooled = pooled_reuse(arrivals, num_workers * rates.device_blocks)
        for tiers in options.tiers:
            print(f"{num_workers} workers, tiers: {tiers}; pooled device LRU {pooled:.1%}")
            print(_line(HEADER))
            reference: Summary | None = None
            for policy in options.policies:
                summary = _run_one(num_workers, rates, tiers, policy, arrivals)
                reference = summary if policy == "RR" else reference
                print(_line(_cells(policy, summary, pooled, reference)), flush=True)
                figures.append(_figures(policy, tiers, summary, pooled))
            print()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.plot:
        _plot(figures, options.plot)


def _run_one(
    num_workers: int, rates: Rates, tiers: str, policy: str, arrivals: Sequence[Arrival]
) -> Summary:
    sizes = [(name, factor * rates.device_blocks) for name, factor in TIERS[tiers]]
    cluster = Cluster(num_workers, rates, sizes, ROUTINGS[policy])
    # What a run builds up is not garbage; to look for some again and again takes most of the time.
    gc.disable()
    try:
        return cluster.run(arrivals)
    finally:
        gc.enable()


def _cells(
    policy: str, summary: Summary, pooled: float, reference: Summary | None
) -> tuple[str, ...]:
    versus = "" if reference is None else f"{summary.mean_ttft_s / reference.mean_ttft_s - 1:+.1%}"
    error = fmean(map(abs, summary.errors_s)) if summary.errors_s else None
    return (
        policy,
        f"{summary.mean_ttft_s:.3f}",
        *(f"{summary.ttft_at(q):.3f}" for q in (0.5, 0.9, 0.99)),
        f"{summary.reuse:.1%}",
        f"{summary.reuse / pooled:.3f}",
        versus,
        f"{summary.puts_per_s:.0f}",
        f"{summary.bytes_per_s / 1e6:.3f}",
        f"{summary.index_bytes / 1e6:.1f}",
        f"{summary.apply_s:.2f}",
        f"{fmean(summary.route_s) * 1e3:.3f}",
        f"{summary.route_p99_s * 1e3:.3f}",
        "" if error is None else f"{error:.3f}",
    )


def _line(cells: Sequence[str]) -> str:
    return cells[0].ljust(11) + "".join(cell.rjust(10) for cell in cells[1:])


def _figures(policy: str, tiers: str, summary: Summary, pooled: float) -> dict[str, object]:
    return {
        "policy": policy,
        "tiers": tiers,
        "workers": summary.num_workers,
        "mean_ttft_s": summary.mean_ttft_s,
        "ttft_s": {q: summary.ttft_at(q) for q in (0.5, 0.9, 0.99)},
        "reuse": summary.reuse,
        "pooled_reuse": pooled,
        "puts_per_s": summary.puts_per_s,
        "bytes_per_s": summary.bytes_per_s,
        "index_bytes": summary.index_bytes,
        "route_p99_s": summary.route_p99_s,
    }


def _plot(figures: Sequence[dict[str, object]], path: Path) -> None:
    from matplotlib import pyplot

    groups = sorted({(str(f["tiers"]), int(str(f["workers"]))) for f in figures})
    _, axes = pyplot.subplots(1, len(groups), figsize=(4 * len(groups), 4), squeeze=False)
    for axis, (tiers, workers) in zip(axes[0], groups, strict=True):
        chosen = [f for f in figures if (f["tiers"], f["workers"]) == (tiers, workers)]
        axis.bar([str(f["policy"]) for f in chosen], [f["mean_ttft_s"] for f in chosen])
        axis.set_title(f"{workers} workers, tiers: {tiers}")
        axis.set_ylabel("mean TTFT, s")
        axis.tick_params(axis="x", rotation=60)
    pyplot.tight_layout()
    pyplot.savefig(path)
