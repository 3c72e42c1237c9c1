"""Ten times what a worker can do: some requests are served as before, others refused at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.chaos.cluster import ChaosCluster
from tests.chaos.model import MODEL_ID, write_chaos_model
from tests.e2e.processes import launcher
from tests.metrics_page import metric

MEASURED_S = 5.0
FACTOR = 10
NORMAL_AGAIN_S = 5.0
"""After the crowd has gone; what was accepted before may have waited --max_queue_time."""
BODY = {"model": MODEL_ID, "prompt": "river stone cloud", "max_tokens": 60, "ignore_eos": True}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ChaosCluster]:
    model = await asyncio.to_thread(write_chaos_model, tmp_path / "model")
    with launcher(tmp_path) as started:
        cluster = ChaosCluster(started, model)
        try:
            await cluster.start(num_members=1, num_workers=1, num_masters=1)
            yield cluster
        finally:
            await cluster.stop()


class Crowd:
    """Counts what becomes of its requests."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self.num_served = 0
        self.num_refused = 0

    async def ask(self) -> float:
        """Seconds until the answer, whatever it is."""
        started = time.monotonic()
        async with self._session.post(self._url, json=BODY) as response:
            if response.status == 429:
                self.num_refused += 1
                assert int(response.headers["Retry-After"]) >= 1
            else:
                assert response.status == 200, await response.text()
                assert (await response.json())["usage"]["completion_tokens"] == 60
                self.num_served += 1
        return time.monotonic() - started

    async def one_after_the_other(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.ask()


@pytest.mark.slow
async def test_ten_times_what_a_worker_can_do(cluster: ChaosCluster) -> None:
    (master,) = cluster.masters
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        crowd = Crowd(session, master.http_url)
        await crowd.ask()
        # As many as fit the batch: the best that it can do.
        end = time.monotonic() + MEASURED_S
        began = crowd.num_served
        await asyncio.gather(*(crowd.one_after_the_other(end) for _ in range(16)))
        best = (crowd.num_served - began) / MEASURED_S
        usual_s = await crowd.ask()

        memory = master.rss_bytes
        began = crowd.num_served
        async with asyncio.TaskGroup() as tasks:
            pause_s = 1 / (FACTOR * best)
            due = time.monotonic()
            end = due + 2 * MEASURED_S
            while time.monotonic() < end:
                tasks.create_task(crowd.ask())
                due += pause_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            served = (crowd.num_served - began) / (2 * MEASURED_S)
            await asyncio.sleep(NORMAL_AGAIN_S)
            normal_s = await crowd.ask()
        print(
            f"best={best:.1f}/s overloaded={served:.1f}/s refused={crowd.num_refused} "
            f"usual_s={usual_s:.2f} afterwards_s={normal_s:.2f} "
            f"memory_bytes={memory} then={master.rss_bytes}"
        )
        assert crowd.num_refused > crowd.num_served
        # Ten percent less on a machine that has a core for the crowd; here it competes.
        assert served > 0.6 * best, "refusing is cheap"
        assert normal_s < 3 * usual_s + 0.5
        assert master.rss_bytes < memory + (64 << 20)
        assert metric(master.operator_url, "xllm_api_requests_in_flight") == 0
