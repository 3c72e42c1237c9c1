"""What both roles tell operators, on a port of its own: /health and /metrics."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from xllm.telemetry import METRICS_CONTENT_TYPE, Metrics

SHUTDOWN_S = 0.5


class OperatorPort:
    """Serves from the start of a process, before it is ready."""

    def __init__(self, metrics: Metrics, is_ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._is_ready = is_ready
        self._collectors: list[Callable[[], None]] = []

    def add_collector(self, collect: Callable[[], None]) -> None:
        """`collect` is called before each look at the metrics, to bring gauges up to date."""
        self._collectors.append(collect)

    def runner(self) -> web.AppRunner:
        app = web.Application()
        app.add_routes(
            [web.get("/health", self._show_health), web.get("/metrics", self._show_metrics)]
        )
        return web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)

    async def _show_health(self, request: web.Request) -> web.Response:
        if self._is_ready():
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "not ready"}, status=503)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        for collect in self._collectors:
            collect()
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": METRICS_CONTENT_TYPE}
        )


@asynccontextmanager
async def serve(runner: web.AppRunner, listening: socket.socket) -> AsyncIterator[None]:
    """Serves on a listening socket until the context is left."""
    try:
        await runner.setup()
        await web.SockSite(runner, listening).start()
        yield
    finally:
        await runner.cleanup()
