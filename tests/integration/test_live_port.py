"""The stream that feeds the live page, over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from xllm.cache.block_hash import CacheRoot
from xllm.cache.index import CacheIndex
from xllm.config import MasterConfig
from xllm.protocol import GenerateRequest, MasterId, MasterInfo, ModelCard, SamplingParams, WorkerId
from xllm.roles import live_port
from xllm.roles.car_policy import CostAware
from xllm.roles.figures import Figures
from xllm.roles.global_scheduler import Candidate
from xllm.roles.journal import Journal
from xllm.roles.live_port import LivePort
from xllm.telemetry import Metrics

INFO = MasterInfo(master_id=MasterId("m"), http_address="m", operator_address="m:1")


class FakeAdmin:
    """What describes the cluster, and how often it was asked to."""

    def __init__(self) -> None:
        self.num_described = 0
        self.workers: list[dict[str, Any]] = []

    def describe(self, masters: object) -> dict[str, Any]:
        self.num_described += 1
        return {"workers": self.workers}

    async def masters(self) -> list[MasterInfo]:
        return [INFO]


class FakeBackend:
    def __init__(self) -> None:
        self.journal = Journal(lambda: 1.0, lambda: 2.0)

    def model_cards(self) -> list[ModelCard]:
        return [ModelCard(model_id="tiny", max_model_len=64, vocab_size=8, created=0)]


class Rig:
    def __init__(self) -> None:
        self.admin = FakeAdmin()
        self.backend = FakeBackend()
        self.figures = Figures(Metrics(engine=False), self.backend.journal)
        self.port = LivePort(MasterConfig(), INFO, self.backend, self.admin, self.figures)  # type: ignore[arg-type]

    def send(self, request_id: str) -> None:
        request = GenerateRequest(
            request_id=request_id, model_id="tiny", prompt_ids=[1], sampling=SamplingParams()
        )
        root = CacheRoot("weights", "float32", 32)
        router = CostAware(CacheIndex(), lambda model_id: root, lambda: 1.0)
        route = router.route(request, [Candidate(WorkerId("w"), None, 0)])
        self.backend.journal.sent(request, route)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_port, "PERIOD_S", 0.01)
    monkeypatch.setattr(live_port, "QUIET_S", 0.02)


@asynccontextmanager
async def looking(rig: Rig) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    app = web.Application()
    app.add_routes(rig.port.routes)
    async with TestClient(TestServer(app)) as client:
        yield client


async def next_event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    while True:
        line = await response.content.readline()
        assert line, "the stream ended"
        if line.startswith(b"data: "):
            event: dict[str, Any] = orjson.loads(line[6:])
            return event


async def test_all_at_first_then_what_is_new() -> None:
    rig = Rig()
    for at in (0.0, 2.0):
        rig.figures.sample(at)
    rig.send("r1")
    async with looking(rig) as client, client.get("/admin/live") as response:
        assert response.content_type == "text/event-stream"
        first = await next_event(response)
        assert first["cluster"]["models"] == ["tiny"]
        assert first["cluster"]["policy"] == "CAR"
        assert first["cluster"]["targets"] == {"ttft_s": 2.0, "tpot_s": 0.1}
        assert [request["request_id"] for request in first["requests"]] == ["r1"]
        assert [point["at"] for point in first["points"]] == [2.0]
        rig.send("r2")
        second = await next_event(response)
        assert second.keys() == {"requests", "now"}
        assert [request["request_id"] for request in second["requests"]] == ["r2"]
        rig.figures.sample(4.0)
        assert [point["at"] for point in (await next_event(response))["points"]] == [4.0]
        rig.admin.workers.append({"worker_id": "w"})
        assert (await next_event(response))["cluster"]["workers"] == [{"worker_id": "w"}]


async def test_a_quiet_cluster_still_says_something() -> None:
    async with looking(Rig()) as client, client.get("/admin/live") as response:
        await next_event(response)
        while (line := await response.content.readline()) == b"\n":
            pass
        assert line.startswith(b": ")


async def test_nothing_is_described_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.send("r")
    assert rig.admin.num_described == 0
    monkeypatch.setattr(live_port, "MAX_VIEWERS", 1)
    async with looking(rig) as client:
        async with client.get("/admin/live") as response:
            await next_event(response)
            async with client.get("/admin/live") as refused:
                assert refused.status == 429
        assert rig.admin.num_described > 0
