"""A real Prometheus scrapes real processes: what the dashboard and the rules ask for is there."""

from __future__ import annotations

import json
import math
import random
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from processes import Launcher, Master, Worker, free_port, http_status, post_json, wait_until

from tests.chaos.model import MODEL_ID, write_chaos_model
from tests.metrics_page import documented, exported
from tests.prometheus_tools import ROOT, get_json, metric_names, prometheus_folder

DASHBOARD = ROOT / "deploy" / "grafana" / "xllm.json"
RULES = ROOT / "deploy" / "prometheus" / "xllm.rules.yml"
WAIT_S = 60.0
BLOCK = 32


@dataclass
class Rig:
    url: str
    """Of Prometheus."""
    master: Master
    worker: Worker

    def query(self, expression: str) -> list[dict[str, Any]]:
        data = get_json(f"{self.url}/api/v1/query", query=expression)
        found: list[dict[str, Any]] = data["result"]
        return found

    def metrics(self, process: Master | Worker) -> dict[str, str]:
        with urllib.request.urlopen(f"{process.operator_url}/metrics", timeout=30) as response:
            return exported(response.read().decode())


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    binary = prometheus_folder() / "prometheus"
    model = write_chaos_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("prometheus")
    with processes.launcher(tmp_path_factory.mktemp("processes")) as launcher:
        etcd = launcher.etcd()
        worker = launcher.worker(
            etcd,
            *(f"--model={model}", f"--model_id={MODEL_ID}", "--dtype=float32", "--num_threads=1"),
            *("--max_cache_size=2MiB", "--max_model_len=512", "--host_cache_size=4MiB"),
            *(f"--disk_cache_dir={folder / 'disk'}", "--disk_cache_size=16MiB"),
            *("--enable_cache_upload=true", "--disk_write_policy=write_through"),
        )
        master = launcher.master(etcd, wait_ready=True)
        url = _start_prometheus(launcher, binary, folder, master, worker)
        rig = Rig(url, master, worker)
        _serve_some(rig)
        yield rig


def _start_prometheus(
    launcher: Launcher, binary: Path, folder: Path, master: Master, worker: Worker
) -> str:
    """The example's config, with our ports and in a hurry."""
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    for part, process in zip(job["static_configs"], (master, worker), strict=True):
        part["targets"] = [process.operator_url.removeprefix("http://")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    process = launcher.spawn(
        "prometheus",
        [
            *(str(binary), f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address={address}",
        ],
    )
    launcher.wait_healthy(process, f"http://{address}/-/ready")
    return f"http://{address}"


def _serve_some(rig: Rig) -> None:
    """Until everything has happened once that is drawn: hits, evictions, loads, an error."""
    wait_until(lambda: len(rig.query("up == 1")) == 2, "both processes to be scraped", WAIT_S)
    rng = random.Random(7)
    prompts = [rng.choices(range(1000, 20000), k=14 * BLOCK) for _ in range(12)]
    for prompt in (*prompts, prompts[-1], prompts[0]):
        body = {"model": MODEL_ID, "prompt": prompt, "max_tokens": 3, "ignore_eos": True}
        post_json(f"{rig.master.http_url}/v1/completions", body)
    assert http_status(f"{rig.master.http_url}/v1/models/nobody") == 404

    def has_seen() -> bool:
        served = rig.query("sum(xllm_request_success_total)")
        return bool(served) and float(served[0]["value"][1]) == 14

    wait_until(has_seen, "Prometheus to have seen the requests", WAIT_S)


def _section(title: str) -> set[str]:
    return {row.name for row in documented()[title]}


def test_the_processes_export_what_the_page_says_and_nothing_else(rig: Rig) -> None:
    always, cluster = _section("Every process"), _section("Membership")
    master = _section("The public API") | _section("Routing, the index and etcd")
    worker = _section("The engine and its tiers") | _section("What the index is told")
    assert set(rig.metrics(rig.master)) == always | cluster | master
    assert set(rig.metrics(rig.worker)) == always | cluster | worker


def test_every_metric_has_a_series_and_so_can_be_drawn(rig: Rig) -> None:
    seen = set(get_json(f"{rig.url}/api/v1/label/__name__/values"))
    for rows in documented().values():
        for row in rows:
            name = f"{row.name}_count" if row.type == "histogram" else row.name
            assert name in seen, row.name


def test_every_query_of_the_dashboard_finds_something(rig: Rig) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    seen = set(get_json(f"{rig.url}/api/v1/label/__name__/values"))
    num_drawn = 0
    for panel in panels:
        for target in panel["targets"]:
            expression = target["expr"]
            assert metric_names(expression) <= seen, panel["title"]
            expression = expression.replace("$__rate_interval", "10m").replace("$instance", ".*")
            assert "$" not in expression
            # A rate takes two looks.
            wait_until(
                lambda asked=expression: bool(rig.query(asked)),
                f"{panel['title']}: {expression}",
                WAIT_S,
            )
            found = rig.query(expression)
            num_drawn += any(not math.isnan(float(one["value"][1])) for one in found)
    assert len(panels) > 25
    assert num_drawn > 60, "most of it has a value after a few requests"
    instances = get_json(
        f"{rig.url}/api/v1/label/instance/values", **{"match[]": "xllm_build_info"}
    )
    assert len(instances) == 2


def test_the_page_and_the_dashboard_know_each_other(rig: Rig) -> None:
    """What a panel asks for is documented."""
    names = {row.name for rows in documented().values() for row in rows}
    suffixes = ("_bucket", "_sum", "_count")
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            for name in metric_names(target["expr"]):
                base = name
                for suffix in suffixes:
                    base = base if base in names else base.removesuffix(suffix)
                assert base in names or base.startswith("process_"), name


def test_rules_are_evaluated_and_a_healthy_cluster_is_quiet(rig: Rig) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = get_json(f"{rig.url}/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(r["health"] == "ok" for r in rules()), "evaluated rules", WAIT_S)
    assert len(rules()) > 20
    critical = [r for r in rules() if r["labels"]["severity"] == "critical"]
    assert len(critical) >= 3

    def is_quiet() -> bool:
        return {rule["state"] for rule in rules() if rule in critical} == {"inactive"}

    wait_until(is_quiet, "no critical alert", WAIT_S)
    assert {one["metric"]["role"] for one in rig.query('up{job="xllm"} == 1')} == {
        *("master", "worker"),
    }
