"""Options, runs, table and plot of `scripts/simulate`."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks.trace import CONVERSATION

from simulation.cluster import Cluster
from simulation.plot import Figures, draw, draw_rates
from simulation.policies import FETCHING, ROUTINGS
from simulation.prefixes import Point, Workload, measure
from simulation.summary import Summary
from simulation.trace import Arrival, pooled_reuse, read_arrivals
from simulation.worker import RATES, Rates, read_rates

TIERS = {"device": (("device", 1),), "all": (("device", 1), ("host", 2), ("disk", 4))}
"""Each tier's blocks, in those of the device."""

QUANTILES = (0.5, 0.9, 0.99)

HEADER = (
    "policy",
    "mean s",
    "p50 s",
    "p90 s",
    "p99 s",
    "reuse %",
    "of pool",
    "fetched %",
    "vs RR %",
    "busy %",
    "puts/s",
    "MB/s",
    "index MB",
    "apply s",
    "route ms",
    "p99 ms",
    "|error| s",
)


POLICIES = [*ROUTINGS, "CAR+peers"]

Run = tuple[str, int, str]
"""Tiers, workers, policy."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload", nargs="?", choices=("trace", "shared_prefix"), default="trace",
        help="shared_prefix: as in `bench cluster`, on two workers, at a range of rates",
    )  # fmt: skip
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.2, 0.4, 0.7, 1.0, 1.3],
        help="shared_prefix: of the rate at which RR saturates",
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, default=CONVERSATION)
    parser.add_argument("--rates", default="cpu", help=f"{', '.join(sorted(RATES))}, or a file")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument(
        "--speedup", type=float, help="of the trace's clock (default: as the rates say, per worker)"
    )
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here; what is there is kept"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")


def run(options: argparse.Namespace) -> None:
    rates = read_rates(RATES.get(options.rates) or Path(options.rates))
    if options.workload == "shared_prefix":
        _run_prefixes(options, rates)
        return
    arrivals = read_arrivals(options.trace, rates.block_size)[: options.requests]
    print(f"rates: {rates.source}\n")
    figures: dict[Run, Figures] = {}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())["runs"]
        figures = {(f["tiers"], f["workers"], f["policy"]): f for f in known}
    for num_workers in options.workers:
        speedup = options.speedup or rates.speedup_per_worker * num_workers
        timed = [replace(arrival, at=arrival.at / speedup) for arrival in arrivals]
        pooled = pooled_reuse(timed, num_workers * rates.device_blocks)
        for tiers in options.tiers:
            print(f"{num_workers} workers, tiers: {tiers}; pooled device LRU {pooled:.1%}")
            print(f"the trace {speedup:g} x as fast\n{_line(HEADER)}")
            for policy in options.policies:
                key = (tiers, num_workers, policy)
                if key not in figures:
                    summary = _in_child(num_workers, rates, tiers, policy, timed)
                    figures[key] = _figures(policy, tiers, summary, pooled, speedup)
                reference = figures.get((tiers, num_workers, "RR"))
                print(_line(_cells(figures[key], reference)), flush=True)
                if options.json:
                    content = {"rates": rates.source, "runs": list(figures.values())}
                    options.json.write_text(json.dumps(content, indent=1) + "\n")
            print()
    if options.plot:
        draw(list(figures.values()), options.plot)


def _run_prefixes(options: argparse.Namespace, rates: Rates) -> None:
    workload = Workload(requests=options.requests) if options.requests else Workload()
    points = measure(workload, rates, options.shares)
    print(
        _line(
            ("policy", "", "share", "req/s", "mean s", "p50 s", "p90 s", "p99 s", "hits", "fetched")
        )
    )
    for point in points:
        summary = point.summary
        cells = (
            *(point.policy, "", f"{point.share:g}", f"{point.rate:.2f}"),
            f"{summary.mean_ttft_s:.3f}",
            *(f"{summary.ttft_at(q):.3f}" for q in QUANTILES),
            *(f"{summary.reuse:.1%}", f"{summary.num_fetched / summary.num_blocks:.1%}"),
        )
        print(_line(cells))
    if options.json:
        runs = [_point_figures(point) for point in points]
        options.json.write_text(json.dumps({"rates": rates.source, "runs": runs}, indent=1) + "\n")
    if options.plot:
        draw_rates([_point_figures(point) for point in points], options.plot)


def _point_figures(point: Point) -> Figures:
    summary = point.summary
    return {
        "policy": point.policy,
        "share": point.share,
        "rate": point.rate,
        "mean_ttft_s": summary.mean_ttft_s,
        "ttft_s": {str(q): summary.ttft_at(q) for q in QUANTILES},
        "reuse": summary.reuse,
        "fetched": summary.num_fetched / summary.num_blocks,
    }


def _in_child(
    num_workers: int, rates: Rates, tiers: str, policy: str, arrivals: Sequence[Arrival]
) -> Summary:
    """In a process of its own, which gives its memory back."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(run_one(num_workers, rates, tiers, policy, arrivals))

    child = context.Process(target=work)
    child.start()
    sender.close()
    try:
        summary: Summary = receiver.recv()
    finally:
        child.join()
    return summary


def run_one(
    num_workers: int, rates: Rates, tiers: str, policy: str, arrivals: Sequence[Arrival]
) -> Summary:
    sizes = [(name, factor * rates.device_blocks) for name, factor in TIERS[tiers]]
    make = FETCHING.get(policy) or ROUTINGS[policy]
    cluster = Cluster(num_workers, rates, sizes, make, policy in FETCHING)
    # What a run builds up is not garbage; to look for some again and again takes most of the time.
    gc.disable()
    try:
        return cluster.run(arrivals)
    finally:
        gc.enable()


def _cells(figures: Figures, reference: Figures | None) -> tuple[str, ...]:
    mean_s = figures["mean_ttft_s"]
    versus = "" if reference is None else f"{mean_s / reference['mean_ttft_s'] - 1:+.1%}"
    error = figures["estimate_error_s"]
    return (
        figures["policy"],
        f"{mean_s:.3f}",
        *(f"{figures['ttft_s'][str(q)]:.3f}" for q in QUANTILES),
        f"{figures['reuse']:.1%}",
        f"{figures['reuse'] / figures['pooled_reuse']:.3f}",
        f"{figures['fetched']:.1%}",
        versus,
        f"{figures['busy']:.0%}",
        f"{figures['puts_per_s']:.0f}",
        f"{figures['bytes_per_s'] / 1e6:.3f}",
        f"{figures['index_bytes'] / 1e6:.1f}",
        f"{figures['apply_s']:.2f}",
        f"{figures['route_mean_s'] * 1e3:.3f}",
        f"{figures['route_p99_s'] * 1e3:.3f}",
        "" if error is None else f"{error:.3f}",
    )


def _line(cells: Sequence[str]) -> str:
    return cells[0].ljust(11) + "".join(cell.rjust(10) for cell in cells[1:])


def _figures(policy: str, tiers: str, summary: Summary, pooled: float, speedup: float) -> Figures:
    return {
        "policy": policy,
        "tiers": tiers,
        "workers": summary.num_workers,
        "speedup": speedup,
        "mean_ttft_s": summary.mean_ttft_s,
        "ttft_s": {str(q): summary.ttft_at(q) for q in QUANTILES},
        "reuse": summary.reuse,
        "fetched": summary.num_fetched / summary.num_blocks,
        "pooled_reuse": pooled,
        "busy": summary.busy,
        "puts_per_s": summary.puts_per_s,
        "bytes_per_s": summary.bytes_per_s,
        "index_bytes": summary.index_bytes,
        "apply_s": summary.apply_s,
        "route_mean_s": fmean(summary.route_s),
        "route_p99_s": summary.route_p99_s,
        "estimate_error_s": fmean(map(abs, summary.errors_s)) if summary.errors_s else None,
    }
