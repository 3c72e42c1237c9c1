"""Every process is replaced while requests run, as an upgrade does it, and nobody notices.

A worker is stopped and started again. A master's successor is started beside it; then it is
drained, and a load balancer that only looks at /health sends the requests to the new one.
"""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.chaos.cluster import ChaosCluster, Master, Worker, until
from tests.chaos.load import Client, Load, make_cases
from tests.chaos.model import write_chaos_model
from tests.e2e.processes import http_status, launcher
from tests.metrics_page import metric
from xllm.roles.departure import QUIET_S

SEED = 3
PROBE_S = 0.5
DRAIN_S = 20


class LoadBalancer:
    """Sends requests to masters that said that they are healthy, up to `PROBE_S` ago."""

    def __init__(self, masters: list[Master]) -> None:
        self.masters = masters
        self._healthy = list(masters)
        self._rng = random.Random(SEED)

    def pick(self) -> tuple[str, object]:
        return self._rng.choice(self._healthy).http_url, lambda: False

    async def probe(self) -> None:
        """Until cancelled."""
        while True:
            statuses = [
                await asyncio.to_thread(http_status, f"{master.http_url}/health")
                for master in self.masters
            ]
            healthy = [m for m, s in zip(self.masters, statuses, strict=False) if s == 200]
            self._healthy = healthy or self._healthy
            await asyncio.sleep(PROBE_S)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ChaosCluster]:
    """One etcd member, two workers, one master; another one is made, but not started."""
    with launcher(tmp_path) as started:
        cluster = ChaosCluster(started, write_chaos_model(tmp_path / "model"))
        try:
            await cluster.start(num_members=1, num_workers=2, num_masters=1)
            yield cluster
        finally:
            await cluster.stop()


async def replace_worker(cluster: ChaosCluster, worker: Worker) -> None:
    worker.stop()
    await until(lambda: not worker.is_running, f"{worker.name} ends", within_s=6.0)
    assert worker.process is not None
    assert worker.process.popen.returncode == 0
    worker.launch()
    for master in cluster.masters:
        await cluster.until_workers(master, len(cluster.workers), within_s=60)


async def replace_master(cluster: ChaosCluster, balancer: LoadBalancer) -> None:
    old = cluster.masters[0]
    new = cluster.add_master()
    new.launch()
    await cluster.until_workers(new, len(cluster.workers), within_s=60)
    balancer.masters = [old, new]
    url = f"{old.operator_url}/admin/leave?timeout={DRAIN_S}"
    request = urllib.request.Request(url, method="POST")
    with await asyncio.to_thread(urllib.request.urlopen, request) as response:
        assert response.status == 202
    assert http_status(f"{old.http_url}/health") == 503
    await until(lambda: not old.is_running, f"{old.name} ends", within_s=DRAIN_S + 5)
    assert old.process is not None
    assert old.process.popen.returncode == 0
    assert "master_drained" in old.log
    cluster.masters = balancer.masters = [new]


@pytest.mark.slow
async def test_no_request_fails(cluster: ChaosCluster) -> None:
    balancer = LoadBalancer(list(cluster.masters))
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        client = Client(session)
        cases = make_cases(random.Random(SEED), 6, 60)
        known = await client.learn(cluster.masters[0].http_url, cases)
        load = Load(client, cases, known, balancer.pick, SEED)
        async with asyncio.TaskGroup() as tasks:
            probing = tasks.create_task(balancer.probe())
            tasks.create_task(load.run(4))
            for worker in cluster.workers:
                await replace_worker(cluster, worker)
            await replace_master(cluster, balancer)
            before = sum(load.tally.outcomes.values())
            await asyncio.sleep(1.0)
            load.stop()
            probing.cancel()
    outcomes = load.tally.outcomes
    assert not load.tally.wrong, "\n".join(load.tally.wrong)
    assert sum(outcomes.values()) > before, "the new master serves"
    assert set(outcomes) == {"streamed", "plain"}


@pytest.mark.slow
async def test_what_only_a_stopped_worker_held_is_with_the_others(cluster: ChaosCluster) -> None:
    (master,) = cluster.masters
    body = {"model": "chaos", "prompt": "once upon a time " * 70, "max_tokens": 1}
    async with aiohttp.ClientSession() as session:

        async def ask() -> tuple[str, int]:
            async with session.post(f"{master.http_url}/v1/completions", json=body) as response:
                usage = (await response.json())["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                return response.headers["x-xllm-worker-id"], cached

        await ask()
        await until(
            lambda: (metric(master.operator_url, "xllm_index_blocks") or 0) >= 8,
            "the master knows of its blocks",
            within_s=10,
        )
        holder, cached = await ask()
        assert cached >= 256, "it went to who has it"
        worker = next(w for w in cluster.workers if w.worker_id == holder)
        worker.stop()
        await until(lambda: not worker.is_running, f"{worker.name} ends", within_s=6.0)
        other, cached = await ask()
        assert other != holder
        # Of a prompt's prefixes of 4, 8, 16, .. blocks of 32 tokens, the longest is kept.
        assert cached >= 256


@pytest.mark.slow
async def test_a_stopped_master_lets_its_requests_end(cluster: ChaosCluster) -> None:
    """SIGTERM without a drain: what runs ends within --drain_timeout, what comes is refused."""
    (master,) = cluster.masters
    body = {"model": "chaos", "prompt": "x", "max_tokens": 300, "ignore_eos": True}
    async with aiohttp.ClientSession() as session:

        async def ask() -> int:
            async with session.post(f"{master.http_url}/v1/completions", json=body) as response:
                answer = await response.json()
                return int(answer["usage"]["completion_tokens"])

        asking = asyncio.create_task(ask())
        await until(
            lambda: metric(master.operator_url, "xllm_api_requests_in_flight") == 1,
            "the request runs",
            within_s=5,
        )
        master.stop()
        assert await asking == 300
        await until(lambda: not master.is_running, "the master ends", within_s=QUIET_S)
    assert master.process is not None
    assert master.process.popen.returncode == 0
