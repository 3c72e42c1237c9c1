"""What is written for operators holds, as far as whoever will read it can tell beforehand.

xllm's own parser reads every command line; Kubernetes' published schemas the manifests; systemd the
units, where it is installed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from xllm.config import MasterConfig, WorkerConfig
from xllm.flag_table import ROLES, role_flags
from xllm.flags import parse_command_line
from xllm.main import AFTER_DRAIN_S
from xllm.operate.command_line import make_parser
from xllm.roles.operator import OperatorPort
from xllm.telemetry import Metrics

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
FLAG_FILES = sorted((ROOT / "deploy/systemd").glob("*.flags"))

KUBERNETES_VERSION = "1.30"
DRAIN_PAUSE_S = 5
"""From a timeout that is over to the kill: what else a process has to do."""

# Flags of other programs in our pages and manifests.
OTHERS = re.compile(
    r"--(name|data-dir|(listen|advertise|initial-advertise)-(client|peer)-urls|endpoints"
    r"|initial-cluster(-state)?|auto-compaction-(mode|retention)|from-file|build|scale|build-arg"
    r"|once|regenerate|minutes|strict|inputs|seed|json|members|prefix)\b"
)

Config = MasterConfig | WorkerConfig


def parse(argv: list[str]) -> Config:
    config = parse_command_line(argv)
    assert isinstance(config, Config)
    return config


OTHERS_COMMANDS = re.compile(r"^```\n(vllm|guidellm) .*?^```", re.MULTILINE | re.DOTALL)


def objects(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in objects(path):
            if "template" in document.get("spec", {}):
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def xllm_pods() -> list[tuple[str, dict[str, Any], Config]]:
    """Name, pod and what its one container is told."""
    found = []
    for name, pod in pods():
        (container,) = pod["containers"]
        if container["image"] == "xllm":
            argv = [arg.replace("$(POD_IP)", "10.1.2.3") for arg in container["args"]]
            argv = [arg.replace("$(POD_NAME)", "pod-0") for arg in argv]
            found.append((name, pod, parse(argv)))
    return found


def operators_flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Of `xllm top` and the like, without dashes."""
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from operators_flags(inner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_the_pages_exists(page: Path) -> None:
    known = {flag.name for role in ROLES for flag in role_flags(role)}
    known |= set(operators_flags(make_parser()))
    text = re.sub(OTHERS_COMMANDS, "", page.read_text())
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z_\-]*[a-z])", text))
    unknown = {name for name in named if not OTHERS.match(f"--{name}")} - known
    unknown -= {f"no{name}" for name in known} | {"flag", "bool", "nobool", "cov", "store"}
    assert not unknown, f"{page.name} names flags that xllm does not have: {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_of_the_pages_is_accepted(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command = line.split("#", 1)[0].strip()
            if command.startswith("xllm --role"):
                parse(shlex.split(command)[1:])


def test_every_metric_of_the_pages_exists() -> None:
    exposed = Metrics().render().decode()
    known = set(re.findall(r"^# TYPE (xllm_\w+)", exposed, re.MULTILINE))
    page = (ROOT / "docs/operations.md").read_text()
    named = set(re.findall(r"\bxllm_\w+", page))
    assert len(named) > 20
    assert not named - known


@pytest.mark.parametrize("path", FLAG_FILES, ids=lambda path: path.name)
def test_flag_files_are_accepted(path: Path) -> None:
    assert isinstance(parse([f"--flagfile={path}"]), Config)


def test_yaml_is_tidy() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "deploy", ".yamllint.yaml"]
    linted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_takes(path: Path) -> None:
    documents = objects(path)
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_a_manifest_that_is_wrong_is_refused() -> None:
    (deployment,) = (d for d in objects(MANIFESTS[1]) if d["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSION, strict=True)


def test_probes_reach_what_the_process_serves() -> None:
    router = OperatorPort(Metrics(), lambda: True).runner().app.router
    operator = {resource.canonical for resource in router.resources()}
    for name, pod, config in xllm_pods():
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["operator"] == config.rpc_server_port
        assert config.net.host == "0.0.0.0"
        assert config.security.operator_key_file, "or the operator port is on loopback only"
        assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "operator"}
        assert container["readinessProbe"]["httpGet"]["path"] == "/health"
        assert {"/live", "/health", "/metrics"} <= operator
        if isinstance(config, MasterConfig):
            assert ports["api"] == config.http_server_port
            assert container["readinessProbe"]["httpGet"]["port"] == "api"
        else:
            assert ports["stream"] == config.port
            assert ports["blocks"] == config.block_port
            assert container["startupProbe"]["httpGet"] == {"path": "/health", "port": "operator"}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/etc/xllm" in mounts, name


def test_nobody_is_killed_before_the_drain_is_over() -> None:
    kinds = set()
    for _, pod, config in xllm_pods():
        kinds.add(type(config))
        grace_s = pod["terminationGracePeriodSeconds"]
        needed_s = config.drain_timeout + AFTER_DRAIN_S + DRAIN_PAUSE_S
        if isinstance(config, MasterConfig):
            hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            (drain_s,) = re.findall(r"/admin/leave\?timeout=(\d+)", hook[-1])
            (sleep_s,) = re.findall(r"time\.sleep\((\d+)\)", hook[-1])
            assert float(sleep_s) >= float(drain_s)
            compile(hook[-1], "preStop", "exec")
            needed_s += float(drain_s)
        assert grace_s >= needed_s
    assert kinds == {MasterConfig, WorkerConfig}


@pytest.mark.parametrize("role", ROLES)
def test_units_leave_time_for_the_drain(role: str) -> None:
    unit = (ROOT / f"deploy/systemd/xllm-{role}.service").read_text()
    config = parse([f"--flagfile={ROOT / f'deploy/systemd/{role}.flags'}"])
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    drain_s = sum(float(text) for text in re.findall(r"/admin/leave\?timeout=(\d+)", unit))
    assert float(stop_s) >= drain_s + config.drain_timeout + AFTER_DRAIN_S + DRAIN_PAUSE_S
    assert f"--flagfile=/etc/xllm/{role}.flags" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_what_systemd_takes(path: Path, tmp_path: Path) -> None:
    # It wants to see the program.
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/opt/xllm/bin/xllm", shutil.which("true") or ""))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = [line for line in verified.stderr.splitlines() if path.name in line]
    assert verified.returncode == 0, verified.stderr
    assert not said


def test_compose_file() -> None:
    (compose,) = objects(ROOT / "deploy/docker/compose.yaml")
    services = compose["services"]
    for name in ROLES:
        service = services[name]
        config = parse(service["command"])
        (grace_s,) = re.findall(r"^(\d+)s$", service["stop_grace_period"])
        assert float(grace_s) >= config.drain_timeout + AFTER_DRAIN_S
        port = config.rpc_server_port
        assert f"http://127.0.0.1:{port}/health" in service["healthcheck"]["test"]
        build = service["build"]
        context = (ROOT / "deploy/docker" / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).is_file()
        assert set(service["depends_on"]) <= set(services)
    assert services["master"]["ports"] == ["8888:8888"]


def test_etcd_is_new_enough() -> None:
    images = [c["image"] for _, pod in pods() for c in pod["containers"]]
    (compose,) = objects(ROOT / "deploy/docker/compose.yaml")
    images.append(compose["services"]["etcd"]["image"])
    versions = [re.search(r"etcd:v(\d+)\.(\d+)\.(\d+)$", i) for i in images if "etcd" in i]
    assert len(versions) == 2
    assert all(found and tuple(map(int, found.groups())) >= (3, 5, 6) for found in versions)


def test_the_image_has_what_it_copies_and_exposes() -> None:
    text = (ROOT / "deploy/docker/Dockerfile").read_text()
    exposed = set(map(int, re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)[1].split()))  # type: ignore[index]
    for _, _, config in xllm_pods():
        ports = {config.rpc_server_port}
        if isinstance(config, MasterConfig):
            ports.add(config.http_server_port)
        else:
            ports |= {config.port, config.block_port}
        assert ports <= exposed
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"xllm", "README.md", "pyproject.toml", "constraints.txt"} & set(ignored)
    assert re.search(r'^ENTRYPOINT \["xllm"\]$', text, re.MULTILINE)
