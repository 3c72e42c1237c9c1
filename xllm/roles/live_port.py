"""What the live page is fed with: GET /admin/live on a master's operator port, server-sent events.

    first event    all that is known: `cluster` (as GET /admin/cluster), `requests` and `points`
    later ones     `cluster` if it has changed, and the requests and points that are new

At most one event per `PERIOD_S`, however much happens. The cluster is described once for all who
look; while nobody looks, nothing is described at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from xllm.config import MasterConfig
from xllm.errors import Overloaded
from xllm.protocol import MasterInfo
from xllm.roles.api.errors import error_response
from xllm.roles.api.sse import CLIENT_CLOSED_REQUEST, ClientGone, EventStream
from xllm.roles.cluster_admin import ClusterAdmin
from xllm.roles.cluster_backend import ClusterBackend
from xllm.roles.figures import PERIOD_S as FIGURE_PERIOD_S
from xllm.roles.figures import Figures
from xllm.roles.journal import Entry

PERIOD_S = 0.5
MASTERS_PERIOD_S = 2.0
"""Masters are read from etcd, which nobody wants to be asked twice a second."""

QUIET_S = 5.0
"""After so long without news a line goes out all the same, so that both sides know of the other."""

MAX_VIEWERS = 32

_QUIET = b": nothing new\n\n"


class LivePort:
    """The routes of one master."""

    def __init__(
        self,
        config: MasterConfig,
        info: MasterInfo,
        backend: ClusterBackend,
        admin: ClusterAdmin,
        figures: Figures,
    ) -> None:
        self._backend = backend
        self._admin = admin
        self._figures = figures
        self._fixed = {
            "policy": config.load_balance_policy,
            "targets": {
                "ttft_s": config.routing.target_ttft / 1e3,
                "tpot_s": config.routing.target_tpot / 1e3,
            },
        }
        self._masters: Sequence[MasterInfo] = (info,)
        self._cluster = b"{}"
        self._cluster_version = 0
        self._cluster_at = 0.0
        self._watching: asyncio.Task[None] | None = None
        self._num_viewers = 0

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.get("/admin/live", self._stream)]

    async def run(self) -> None:
        """Samples the figures, until cancelled: what a page shows begins before it is opened."""
        while True:
            self._figures.sample(time.time())
            await asyncio.sleep(FIGURE_PERIOD_S)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if self._num_viewers >= MAX_VIEWERS:
            return error_response(Overloaded(f"{MAX_VIEWERS} pages look already"))
        self._num_viewers += 1
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch_masters())
        try:
            return await self._feed(request)
        except ClientGone:
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        finally:
            self._num_viewers -= 1
            if not self._num_viewers:
                self._watching.cancel()
                self._watching = None

    async def _feed(self, request: web.Request) -> web.StreamResponse:
        """Raises: ClientGone."""
        stream = EventStream(request)
        journal, figures = self._backend.journal, self._figures
        seen_cluster = seen_requests = seen_points = -1
        quiet_since = time.monotonic()
        while True:
            self._describe_cluster()
            news: dict[str, Any] = {}
            if seen_cluster != self._cluster_version:
                news["cluster"] = orjson.Fragment(self._cluster)
                seen_cluster = self._cluster_version
            entries = journal.entries(max(seen_requests, 0))
            if entries or seen_requests < 0:
                seen_requests = journal.version
                news["requests"] = await self._describe_requests(entries)
            if seen_points != figures.num_points:
                news["points"] = figures.describe(max(seen_points, 0))
                seen_points = figures.num_points
            now = time.monotonic()
            if news:
                news["now"] = round(time.time(), 3)
                await stream.send(b"data: " + orjson.dumps(news) + b"\n\n")
                quiet_since = now
            elif now - quiet_since > QUIET_S:
                await stream.send(_QUIET)
                quiet_since = now
            await asyncio.sleep(PERIOD_S)

    async def _describe_requests(self, entries: Sequence[Entry]) -> list[orjson.Fragment]:
        described = []
        for entry in entries:
            described.append(orjson.Fragment(entry.as_json(time.monotonic())))
            # Many at once, with many candidates, take longer than the event loop may be kept.
            await asyncio.sleep(0)
        return described

    def _describe_cluster(self) -> None:
        now = time.monotonic()
        if now - self._cluster_at < PERIOD_S / 2:
            return
        self._cluster_at = now
        models = [card.model_id for card in self._backend.model_cards()]
        described = self._admin.describe(self._masters) | self._fixed | {"models": models}
        cluster = orjson.dumps(described)
        if cluster != self._cluster:
            self._cluster = cluster
            self._cluster_version += 1

    async def _watch_masters(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MASTERS_PERIOD_S):
                    self._masters = await self._admin.masters()
            await asyncio.sleep(MASTERS_PERIOD_S)
