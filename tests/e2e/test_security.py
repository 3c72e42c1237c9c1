"""A cluster with all of its security on, as its users, its operators and strangers meet it."""

from __future__ import annotations

import json
import signal
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from processes import Launcher, Process, free_port, wait_until

from tests.certificates import authority, write_certificates

ALICE, BOB, CAROL = "sk-alice-0123456789", "sk-bob-01234567890", "sk-carol-0123456789"
OPERATOR = "the-operators-own-key"
PROMPT = "The block cache of one tenant is nobody else's business. " * 8
WORKER = ("--dtype=float32", "--max_cache_size=512M", "--num_threads=1")


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def call(url: str, key: str | None = None, body: object = None) -> tuple[int, dict[str, Any]]:
    """Status and answer; only the cluster's authority is believed."""
    context = ssl.create_default_context(cadata=authority().cert_pem.bytes().decode())
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            text = response.read()
            is_json = "json" in response.headers["Content-Type"]
            return response.status, json.loads(text) if is_json else {}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def cached_tokens(url: str, key: str, **fields: object) -> int:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, **fields}
    status, answer = call(f"{url}/v1/completions", key, body)
    assert status == 200, answer
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def is_up(url: str) -> bool:
    try:
        return call(f"{url}/health")[0] == 200
    except OSError:
        return False


def test_a_cluster_behind_keys_and_certificates(
    launcher: Launcher, tmp_path: Path, default_model_folder: Path
) -> None:
    files = write_certificates(tmp_path / "tls")
    keys = private(tmp_path / "keys", f"alice:{ALICE}\nbob:{BOB} requests_per_minute=5\n")
    tls = (
        f"--tls_cert={files.tls_cert}",
        f"--tls_key={files.tls_key}",
        f"--tls_ca={files.tls_ca}",
    )
    secret = f"--cluster_secret_file={private(tmp_path / 'secret', 's' * 32)}"
    operator = f"--operator_key_file={private(tmp_path / 'operator', OPERATOR)}"
    etcd = launcher.etcd()
    own = (*tls, secret, operator, f"--etcd_addr={etcd.address}")
    ports = [free_port() for _ in range(5)]
    master = launcher.xllm(
        *("--role=master", f"--http_server_port={ports[0]}", f"--rpc_server_port={ports[1]}"),
        *(*own, f"--api_keys_file={keys}"),
        name="master",
    )
    model = f"--model={default_model_folder}"
    worker = launcher.xllm(
        *("--role=worker", f"--port={ports[2]}", f"--rpc_server_port={ports[3]}", model),
        *(*WORKER, *own, "--block_port=0"),
        name="worker",
    )
    stranger = launcher.xllm(
        *("--role=worker", f"--port={ports[4]}", model, *WORKER, *tls, operator),
        *(f"--etcd_addr={etcd.address}", "--worker_id=stranger", "--block_port=0"),
        name="stranger",
    )
    url, operator_url = f"https://127.0.0.1:{ports[0]}", f"https://127.0.0.1:{ports[1]}"
    wait_until(lambda: is_up(url), "the API", 90)
    check_tenants(url)
    check_operator_port(operator_url)
    check_operator_port(f"https://127.0.0.1:{ports[3]}")

    stranger.wait_for_log("worker_ready")
    master.wait_for_log(r"record_not_trusted key=/xllm/default/workers/stranger")
    _, cluster = call(f"{operator_url}/admin/cluster", OPERATOR)
    assert [found["worker_id"] for found in cluster["workers"]] == [f"127.0.0.1:{ports[2]}"]

    private(keys, f"bob:{BOB}\ncarol:{CAROL}\n")
    master.send(signal.SIGHUP)
    master.wait_for_log("reloaded what=api_keys")
    assert call(f"{url}/v1/models", ALICE)[0] == 401
    assert cached_tokens(url, CAROL) == 0
    assert cached_tokens(url, CAROL) > 64
    private(keys, "no key\n")
    master.send(signal.SIGHUP)
    master.wait_for_log("reload_failed what=api_keys")
    assert call(f"{url}/v1/models", CAROL)[0] == 200
    for process in (master, worker):
        for word in (ALICE, BOB, CAROL, OPERATOR, "s" * 32):
            assert word not in process.log
    assert master.stop() == 0


def check_tenants(url: str) -> None:
    status, answer = call(f"{url}/v1/models")
    assert (status, answer["error"]["type"]) == (401, "invalid_request_error")
    assert cached_tokens(url, ALICE) == 0
    cached = cached_tokens(url, ALICE)
    assert cached > 64
    assert cached_tokens(url, BOB) == 0, "what alice has had computed is not bob's to see"
    assert cached_tokens(url, BOB) == cached
    assert cached_tokens(url, BOB, cache_salt="alice") == 0
    assert cached_tokens(url, ALICE, cache_salt="alice") == 0
    assert cached_tokens(url, ALICE) == cached
    statuses = [
        call(f"{url}/v1/completions", BOB, {"prompt": "x", "max_tokens": 1})[0] for _ in range(3)
    ]
    assert statuses == [200, 200, 429]


def check_operator_port(url: str) -> None:
    assert call(f"{url}/health")[0] == 200
    for key in (None, ALICE, OPERATOR + "x"):
        assert call(f"{url}/metrics", key)[0] == 401
        assert call(f"{url}/admin/drain", key, {})[0] == 401
    assert call(f"{url}/metrics", OPERATOR)[0] == 200


def listening_on(process: Process, port: int) -> list[str]:
    found = psutil.Process(process.popen.pid).net_connections("inet")
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


def test_without_a_key_the_operator_port_is_on_loopback_whatever_the_host(
    launcher: Launcher, tmp_path: Path
) -> None:
    etcd = launcher.etcd()
    http_port, operator_port = free_port(), free_port()
    flags = (
        *("--role=master", "--host=0.0.0.0", f"--http_server_port={http_port}"),
        *(f"--rpc_server_port={operator_port}", f"--etcd_addr={etcd.address}"),
    )
    master = launcher.xllm(*flags, name="master")
    master.wait_for_log("operator_port_on_loopback")
    master.wait_for_log("master_listening")
    assert listening_on(master, http_port) == ["0.0.0.0"]
    assert listening_on(master, operator_port) == ["127.0.0.1"]
    master.stop()
    with_key = launcher.xllm(
        *flags, f"--operator_key_file={private(tmp_path / 'key', OPERATOR)}", name="master"
    )
    with_key.wait_for_log("master_listening")
    assert listening_on(with_key, operator_port) == ["0.0.0.0"]
    exposed = launcher.xllm(*flags, "--operator_host=0.0.0.0", name="master")
    assert exposed.wait(30) == 2
    assert "--operator_key_file" in exposed.log.splitlines()[-1]
