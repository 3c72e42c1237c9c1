"""docs/metrics.md says what is exported: every metric, its type, its labels and its meaning."""

from __future__ import annotations

from itertools import chain

from prometheus_client.metrics import MetricWrapperBase

from tests.metrics_page import Row, documented, exported
from xllm.telemetry import Metrics

ALWAYS = ["Every process"]
API = ["The public API"]
ENGINE = ["The engine and its tiers"]
CLUSTER = ["Membership"]
ROUTING = ["Routing, the index and etcd"]
UPLOAD = ["What the index is told"]


def _declared(metrics: Metrics) -> list[Row]:
    rows = []
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            kind = "gauge" if family.type == "info" else family.type
            labels = tuple(metric._labelnames)
            rows.append(Row(family.name + suffix, kind, labels, family.documentation))
    return rows


def _names(*sections: list[str]) -> set[str]:
    return {row.name for title in chain(*sections) for row in documented()[title]}


def test_the_page_has_every_metric_as_it_is_declared_and_no_other() -> None:
    on_page = [row for rows in documented().values() for row in rows]
    declared = _declared(Metrics())

    assert len({row.name for row in on_page}) == len(on_page)
    assert sorted(on_page) == sorted(declared)
    assert len(declared) > 80


def test_each_role_exports_the_sections_that_the_page_gives_it() -> None:
    master = Metrics(engine=False)
    worker = Metrics(api=False, routing=False)
    worker_alone = Metrics(cluster=False, routing=False)

    assert set(exported(master.render().decode())) == _names(ALWAYS, API, CLUSTER, ROUTING)
    assert set(exported(worker.render().decode())) == _names(ALWAYS, ENGINE, CLUSTER, UPLOAD)
    assert set(exported(worker_alone.render().decode())) == _names(ALWAYS, API, ENGINE)
