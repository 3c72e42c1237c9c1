"""Open-loop load against a cluster: what its users get at each rate.

    scripts/bench cluster --url=http://127.0.0.1:8888 shared_prefix --rates 1 2 4
    scripts/bench cluster --url=http://127.0.0.1:8888 trace --divide 8 --speedup 20
    scripts/bench cluster shared_prefix         a cluster of its own: the policies compared
    scripts/bench cluster hot_prefix            likewise: one prefix beyond one worker's capacity

The comparison runs every policy, with and without fetching from peers, over two workers whose
device caches hold `--cache_share` of the shared prompts each. Its rates are shares of the rate at
which RR without peers saturates. It takes half an hour: with `--state` it can be done in pieces.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import uvloop

from benchmarks import workloads
from benchmarks.cluster_rig import SETTINGS, Rig, Setting
from benchmarks.open_loop import Record, Summary, run_closed_loop, run_open_loop, summarize
from benchmarks.report import Row, at_least, at_most, plain
from benchmarks.trace import CONVERSATION
from benchmarks.workloads import Session
from tests.e2e.processes import launcher

SUMMARY = "open-loop load: percentiles, hit rate, throughput, goodput per rate"

JUDGED_SHARE = 0.7
"""Of RR's saturation rate: where the policies are compared."""

_COLUMNS = (
    *("run", "req/s", "sent", "failed", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99"),
    *("hits", "tok/s", "goodput/s", "hits by tier"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("workload", choices=("shared_prefix", "multi_round", "trace", "hot_prefix"))
    add("--url", help="a running cluster's public API; left out: one is started")
    add("--model", help="left out: the only one that is served")
    add("--rates", type=float, nargs="+", help="requests per second (default: 1 2 4)")
    add("--shares", type=float, nargs="+", default=[0.4, JUDGED_SHARE, 1.0, 1.3],
        help="of RR's saturation rate, for a cluster of its own")  # fmt: skip
    add("--duration", type=float, default=60.0, help="seconds of arrivals per rate")
    add("--warm", type=float, default=0.25, help="share of that which is not measured")
    add("--seed", type=int, default=1)
    add("--groups", type=int, default=24, help="shared_prefix: different system prompts")
    add("--system", type=int, default=1024, help="shared_prefix: tokens of a system prompt")
    add("--question", type=int,
        help="tokens, or words in multi_round (default: 32; hot_prefix: 256, so that workers are"
        " the bottleneck and not the generator beside them)")  # fmt: skip
    add("--output", type=int, default=8, help="tokens of an answer")
    add("--users", type=int, default=32, help="multi_round")
    add("--rounds", type=int, default=5, help="multi_round: requests of each user")
    add("--think", type=float, default=1.0, help="multi_round: seconds between rounds")
    add("--trace", type=Path, default=CONVERSATION, help="trace: a file in Mooncake's format")
    add("--divide", type=int, default=16, help="trace: lengths are divided by this")
    add("--speedup", type=float, default=1.0, help="trace: of its clock")
    add("--requests", type=int, default=500, help="trace: only the first so many")
    add("--cache_share", type=float, default=0.4,
        help="of all system prompts, in one worker's cache")  # fmt: skip
    add("--state", type=Path, metavar="FILE",
        help="of a comparison: what was measured is kept here, and not measured again")  # fmt: skip
    add("--minutes", type=float, default=float("inf"),
        help="of a comparison: begin no run later; rows come when all is measured")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="the rate curve; needs matplotlib")


def run(options: argparse.Namespace) -> list[Row]:
    if options.question is None:
        options.question = 256 if options.workload == "hot_prefix" else 32
    if options.url is not None:
        return _against(options)
    with (
        tempfile.TemporaryDirectory(prefix="xllm-bench-") as folder,
        launcher(Path(folder)) as procs,
    ):
        cache_tokens = int(options.cache_share * options.groups * options.system)
        longest = options.system + options.question + options.output
        max_model_len = -(-longest // 256) * 256
        rig = Rig(procs, max(cache_tokens, max_model_len), max_model_len)
        if options.workload == "hot_prefix":
            return _hot_prefix(options, rig)
        return _compare(options, rig)


def _against(options: argparse.Namespace) -> list[Row]:
    """A cluster that runs: the rate curve of one workload."""
    rates = options.rates or [1.0, 2.0, 4.0]
    if options.workload == "trace":
        rates = [options.speedup]
    print(_line(_COLUMNS))
    curve = [_open_loop(options, options.url, options.workload, rate) for rate in rates]
    _plot(options, curve)
    rows = []
    for summary in curve:
        rows += _rows(f"at {summary.rate:.3g}/s ", summary)
    return rows


class _Point(msgspec.Struct):
    """One run of a comparison."""

    policy: str
    peers: bool
    share: float
    summary: Summary


class _State(msgspec.Struct):
    saturation: float = 0.0
    """Requests per second; 0: not measured yet."""
    points: list[_Point] = []


def _compare(options: argparse.Namespace, rig: Rig) -> list[Row]:
    started = time.monotonic()
    state = _State()
    if options.state and options.state.exists():
        state = msgspec.json.decode(options.state.read_bytes(), type=_State, strict=False)
    rig.start_workers(2)
    if not state.saturation:
        url = rig.use(Setting("RR", peers=False))
        state.saturation = _saturation(options, url)
        _keep(options, state)
    else:
        _warm_up(rig.use(Setting("RR", peers=False)), options)
    saturation = state.saturation
    print(f"RR without peers saturates at {saturation:.2f} requests/s\n{_line(_COLUMNS)}")
    curve = {(Setting(p.policy, p.peers), p.share): p.summary for p in state.points}
    for share in sorted(
        {*options.shares, JUDGED_SHARE}, key=lambda share: abs(share - JUDGED_SHARE)
    ):
        for setting in SETTINGS:
            if (setting, share) in curve:
                print(_line(_cells(curve[setting, share])))
                continue
            if time.monotonic() - started > options.minutes * 60:
                print("the rest is left for the next time")
                return []
            summary = _open_loop(options, rig.use(setting), setting.name, share * saturation)
            curve[setting, share] = summary
            state.points.append(_Point(setting.policy, setting.peers, share, summary))
            _keep(options, state)
    _plot(options, list(curve.values()))
    rows = [plain("saturation of RR", saturation, "requests/s")]
    for setting in SETTINGS:
        rows += _rows(f"{setting.name}: ", curve[setting, JUDGED_SHARE])
    before = curve[Setting("RR", peers=False), JUDGED_SHARE]
    after = curve[Setting("CAR", peers=True), JUDGED_SHARE]
    rows += [
        at_least("hit_rate", after.hit_rate, "CAR with peers", max(before.hit_rate, 1e-9), 1.8),
        at_most("ttft_p90", after.ttft_s[0.9], "CAR with peers", before.ttft_s[0.9], 1 / 3),
    ]
    for (setting, share), summary in curve.items():
        if setting.policy == "CAR":
            other = curve[Setting("LEAST_LOAD", setting.peers), share]
            name = f"{setting.name} at {share:g}: ttft_p90"
            rows.append(at_most(name, summary.ttft_s[0.9], "LEAST_LOAD", other.ttft_s[0.9], 1.05))
    return rows


def _keep(options: argparse.Namespace, state: _State) -> None:
    if options.state:
        options.state.write_bytes(msgspec.json.format(msgspec.json.encode(state)))


def _hot_prefix(options: argparse.Namespace, rig: Rig) -> list[Row]:
    """One prefix, of which one worker is asked three times what it can serve."""
    rig.start_workers(1)
    url = rig.use(Setting("CAR", peers=True))
    model = options.model
    _warm_up(url, options)
    alone = _closed_loop(options, url, _hot_sessions(options, 1000.0), 15.0)
    capacity = summarize("one worker", alone, 2.0).requests_per_s
    rig.start_workers(2)
    url = rig.use(Setting("CAR", peers=True))
    sessions = _hot_sessions(options, 3 * capacity)
    sessions = [session for session in sessions if session.start_s < options.duration / 2]
    records = uvloop.run(run_open_loop(url, sessions, model))
    first_s = {
        worker.worker_id: min(
            (
                r.token_times[0]
                for r in records
                if r.is_answered and r.worker_id == worker.worker_id
            ),
            default=float("inf"),
        )
        for worker in rig.workers
    }
    both = summarize("both", records, 2.0)
    print(_line(_COLUMNS))
    print(_line(_cells(both)), flush=True)
    return [
        plain("one worker", capacity, "requests/s"),
        at_most("both serve it after", max(first_s.values()), "s", 1.0, 2.0),
        at_least("throughput of both", both.requests_per_s, "requests/s", capacity, 1.8),
    ]


def _hot_sessions(options: argparse.Namespace, rate: float) -> list[Session]:
    prompts = max(64, int(rate * options.duration))
    return workloads.shared_prefix(
        rate=rate,
        seed=options.seed,
        groups=1,
        prompts=prompts,
        system=options.system,
        question=options.question,
        output=options.output,
    )


def _warm_up(url: str, options: argparse.Namespace) -> None:
    """The step costs of each worker are measured before anything is judged by them."""
    sessions = _sessions(options, "shared_prefix", 1000.0)
    uvloop.run(run_closed_loop(url, sessions[:6], options.model, 2, 30.0))


def _saturation(options: argparse.Namespace, url: str) -> float:
    """Requests per second that are answered when there are always some that wait."""
    _warm_up(url, options)
    sessions = _sessions(options, options.workload, 1000.0)
    records = _closed_loop(options, url, sessions, options.duration / 2)
    return summarize("saturation", records, options.duration / 8).requests_per_s


def _closed_loop(
    options: argparse.Namespace, url: str, sessions: Sequence[Session], duration_s: float
) -> list[Record]:
    return uvloop.run(run_closed_loop(url, sessions, options.model, 16, duration_s))


def _open_loop(options: argparse.Namespace, url: str, name: str, rate: float) -> Summary:
    sessions = _sessions(options, options.workload, rate)
    if options.workload == "shared_prefix":
        sessions = [session for session in sessions if session.start_s < options.duration]
    records = uvloop.run(run_open_loop(url, sessions, options.model))
    end_s = max(session.start_s for session in sessions)
    summary = summarize(name, records, options.warm * end_s)
    print(_line(_cells(summary)), flush=True)
    return summary


def _sessions(options: argparse.Namespace, workload: str, rate: float) -> list[Session]:
    if workload == "trace":
        return workloads.trace(
            path=options.trace,
            seed=options.seed,
            divide=options.divide,
            speedup=options.speedup,
            requests=options.requests,
        )
    if workload == "multi_round":
        return workloads.multi_round(
            rate=rate,
            seed=options.seed,
            users=options.users,
            rounds=options.rounds,
            question=options.question,
            output=options.output,
            think_s=options.think,
        )
    num_requests = min(rate, 100.0) * options.duration * 1.5
    return workloads.shared_prefix(
        rate=rate,
        seed=options.seed,
        groups=options.groups,
        prompts=int(num_requests / options.groups) + 1,
        system=options.system,
        question=options.question,
        output=options.output,
    )


def _rows(prefix: str, summary: Summary) -> list[Row]:
    rows = [plain(f"{prefix}hit_rate", summary.hit_rate, "of prompt tokens")]
    rows += [plain(f"{prefix}ttft_p{q * 100:g}", s, "s") for q, s in summary.ttft_s.items()]
    rows += [plain(f"{prefix}tpot_p{q * 100:g}", s, "s") for q, s in summary.tpot_s.items()]
    rows += [
        plain(f"{prefix}throughput", summary.output_tokens_per_s, "tokens/s"),
        plain(f"{prefix}goodput", summary.goodput_per_s, "requests/s"),
        plain(f"{prefix}failed", summary.num_failed, "requests"),
    ]
    return rows


def _cells(summary: Summary) -> tuple[str, ...]:
    def quantiles(values: dict[float, float], scale: float) -> list[str]:
        return [f"{values[q] * scale:.3g}" if values else "-" for q in (0.5, 0.9, 0.99)]

    by_tier = " ".join(
        f"{tier} {share:.0%}" for tier, share in summary.hit_rate_by_tier.items() if share
    )
    return (
        *(summary.name, f"{summary.rate:.2f}", str(summary.num_requests), str(summary.num_failed)),
        *quantiles(summary.ttft_s, 1.0),
        *(f"{ms} ms" for ms in quantiles(summary.tpot_s, 1e3)),
        f"{summary.hit_rate:.1%}",
        f"{summary.output_tokens_per_s:.1f}",
        f"{summary.goodput_per_s:.2f}",
        by_tier,
    )


def _line(cells: Sequence[str]) -> str:
    return cells[0].ljust(25) + "".join(f"  {cell:>8}" for cell in cells[1:])


def _plot(options: argparse.Namespace, curve: Iterable[Summary]) -> None:
    if options.plot is None:
        return
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    by_name: dict[str, list[Summary]] = {}
    for summary in curve:
        by_name.setdefault(summary.name, []).append(summary)
    for name, summaries in by_name.items():
        rates = [s.rate for s in summaries]
        axes[0].plot(rates, [s.ttft_s.get(0.9) for s in summaries], marker="o", label=name)
        axes[1].plot(rates, [s.hit_rate for s in summaries], marker="o")
        axes[2].plot(rates, [s.goodput_per_s for s in summaries], marker="o")
    labels = ("TTFT p90, s", "share of prompt tokens reused", "goodput, requests/s")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel("requests/s")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[0].set_yscale("symlog")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=3)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(options.plot)
