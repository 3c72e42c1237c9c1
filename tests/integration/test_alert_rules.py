"""The alert rules, by promtool: they are valid, fire when they should, and stay quiet otherwise."""

from __future__ import annotations

import re
import subprocess

import yaml

from tests.metrics_page import documented
from tests.prometheus_tools import ROOT, metric_names, prometheus_folder

FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "xllm.rules.yml"
TESTS = FOLDER / "xllm.rules.test.yml"


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        [prometheus_folder() / "promtool", *arguments],
        capture_output=True,
        text=True,
        cwd=FOLDER,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_and_the_example_of_a_config_are_valid() -> None:
    promtool("check", "rules", "--lint-fatal", RULES.name)
    promtool("check", "config", "--lint-fatal", "prometheus.yml")


def test_each_alert_fires_when_it_should_and_stays_quiet_otherwise() -> None:
    promtool("test", "rules", TESTS.name)
    alerts = [
        rule["alert"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    ]
    tested = yaml.safe_load(TESTS.read_text())["tests"]
    for alert in alerts:
        outcomes = [
            bool(rule_test["exp_alerts"])
            for test in tested
            for rule_test in test["alert_rule_test"]
            if rule_test["alertname"] == alert
        ]
        assert sorted(outcomes) == [False, True], alert
    assert len(alerts) > 20


def test_rules_ask_for_metrics_that_there_are() -> None:
    names = {row.name for rows in documented().values() for row in rows}
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            asked = {re.sub(r"_bucket$", "", name) for name in metric_names(rule["expr"])}
            assert asked <= names, rule["alert"]
            assert asked or rule["expr"].startswith("up{"), rule["alert"]
