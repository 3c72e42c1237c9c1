"""The operator port over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import unused_port

from xllm.net import listen
from xllm.roles.http_server import serve
from xllm.roles.operator import OperatorPort
from xllm.telemetry import Metrics


class Process:
    """What a role tells its operator port."""

    def __init__(self) -> None:
        self.is_ready = True
        self.drains: list[float | None] = []

    def drain(self, timeout_s: float | None) -> float:
        self.drains.append(timeout_s)
        return 3.0 if timeout_s is None else timeout_s


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
async def url(process: Process) -> AsyncIterator[str]:
    port = unused_port()
    operator = OperatorPort(Metrics(), lambda: process.is_ready, drain=process.drain)
    with listen("127.0.0.1", port, flag="port") as listening:
        async with serve(operator.runner(), listening):
            yield f"http://127.0.0.1:{port}"


async def test_health_follows_the_process(process: Process, url: str) -> None:
    async with ClientSession() as session:
        for is_ready, status in ((True, 200), (False, 503)):
            process.is_ready = is_ready
            async with session.get(f"{url}/health") as response:
                assert response.status == status


async def test_a_process_that_is_not_ready_is_alive(process: Process, url: str) -> None:
    process.is_ready = False
    async with ClientSession() as session, session.get(f"{url}/live") as response:
        assert response.status == 200


async def test_metrics_are_collected_when_they_are_looked_at(url: str) -> None:
    async with ClientSession() as session, session.get(f"{url}/metrics") as response:
        assert "xllm_workers" in await response.text()


@pytest.mark.parametrize(("query", "timeout_s"), [("", 3.0), ("?timeout=60", 60.0)])
async def test_drain_begins_and_says_how_long_it_takes(
    process: Process, url: str, query: str, timeout_s: float
) -> None:
    async with ClientSession() as session, session.post(f"{url}/admin/drain{query}") as response:
        assert response.status == 202
        assert await response.json() == {"status": "draining", "timeout": timeout_s}
    assert len(process.drains) == 1


@pytest.mark.parametrize("seconds", ["soon", "-1", "inf", "nan"])
async def test_a_drain_for_no_time_is_refused(process: Process, url: str, seconds: str) -> None:
    url = f"{url}/admin/drain?timeout={seconds}"
    async with ClientSession() as session, session.post(url) as response:
        assert response.status == 400
    assert process.drains == []


async def test_reading_drains_nothing(process: Process, url: str) -> None:
    async with ClientSession() as session, session.get(f"{url}/admin/drain") as response:
        assert response.status == 405
    assert process.drains == []
