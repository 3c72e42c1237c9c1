"""What operators see and do, on a port of its own.

GET  /health            200 when the process can serve, else 503; for everybody
GET  /live              200 as long as the process does anything; for everybody
GET  /metrics           for Prometheus
POST /admin/drain       a worker stops taking requests, lets running ones end, and ends itself;
                        ?timeout=SECONDS instead of --drain_timeout
POST /admin/leave       a master says that it is not healthy, serves on, and ends when nobody uses
                        it any more, or after ?timeout=SECONDS: `departure.py`

and what the role adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from xllm.net import is_loopback
from xllm.roles.page_files import is_open
from xllm.security.operator_key import OperatorKey
from xllm.telemetry import METRICS_CONTENT_TYPE, Metrics

SHUTDOWN_S = 0.5


class OperatorPort:
    """Serves from the start of a process, before it is ready."""

    def __init__(
        self,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        routes: Iterable[web.RouteDef] = (),
        max_body_bytes: int = 1 << 20,
        drain: Callable[[float | None], float] | None = None,
        drain_path: str = "/admin/drain",
        key: OperatorKey | None = None,
    ) -> None:
        """`routes`: the role's own. `drain` begins to drain the process, in as many seconds as it
        returns. Without a `key` the port has to be on loopback."""
        self._key = key
        self._metrics = metrics
        self._is_ready = is_ready
        self._routes = tuple(routes)
        self._max_body_bytes = max_body_bytes
        self._drain = drain
        self._drain_path = drain_path
        self._collectors: list[Callable[[], None]] = []

    def add_collector(self, collect: Callable[[], None]) -> None:
        """`collect` is called before each look at the metrics, to bring gauges up to date."""
        self._collectors.append(collect)

    def runner(self) -> web.AppRunner:
        app = web.Application(client_max_size=self._max_body_bytes, middlewares=[_guard(self._key)])
        app.add_routes(
            [
                web.get("/health", self._show_health),
                web.get("/live", self._show_life),
                web.get("/metrics", self._show_metrics),
                *self._routes,
            ]
        )
        if self._drain is not None:
            app.add_routes([web.post(self._drain_path, self._begin_drain)])
        return web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)

    async def _show_health(self, request: web.Request) -> web.Response:
        if self._is_ready():
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "not ready"}, status=503)

    async def _show_life(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        for collect in self._collectors:
            collect()
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": METRICS_CONTENT_TYPE}
        )

    async def _begin_drain(self, request: web.Request) -> web.Response:
        assert self._drain is not None
        text = request.query.get("timeout")
        try:
            timeout_s = None if text is None else float(text)
        except ValueError:
            timeout_s = math.nan
        if timeout_s is not None and not 0 <= timeout_s < math.inf:
            error = f"timeout={text!r}: expected seconds"
            return web.json_response({"error": error}, status=400)
        return web.json_response(
            {"status": "draining", "timeout": self._drain(timeout_s)}, status=202
        )


def _guard(key: OperatorKey | None) -> Middleware:
    """Who may do more than ask for health: who has the key, in a header; without one, whoever is
    on this machine, except pages in its user's browser that are not from here: these can send
    requests, though they cannot read answers."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in ("/health", "/live") or is_open(request.path):
            return await handler(request)
        if key is None:
            if _is_from_another_site(request):
                return _refusal(403, "no requests of other sites' pages")
        elif not key.is_in(request.headers.get("Authorization")):
            response = _refusal(401, "expected `Authorization: Bearer` and the operators' key")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        return await handler(request)

    return middleware


def _is_from_another_site(request: web.Request) -> bool:
    """A page of another site says so, in one of two headers; one whose name was pointed here has a
    foreign Host. Another port of this machine is another site, too."""
    try:
        host = urlsplit(f"//{request.host}").hostname
    except ValueError:
        host = None
    if host is None or not is_loopback(host):
        return True
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() != f"{request.scheme}://{request.host}".lower():
        return True
    return request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
