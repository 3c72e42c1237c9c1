"""Pages of other origins that may use the API: `--cors_allow_origins`.

A browser asks first (OPTIONS), and shows a page no answer whose headers do not name its origin.
Cookies are none of it: a page brings its API key itself.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

_MAX_AGE_S = "600"
_SHOWN_HEADERS = "X-Request-Id, x-xllm-worker-id, Retry-After"


class Cors:
    """The rules for a list of origins."""

    def __init__(self, origins: str) -> None:
        """origins: comma-separated, or `*`; empty: browsers let nobody in."""
        self._origins = frozenset(filter(None, origins.split(",")))

    @property
    def middleware(self) -> Middleware:
        """To stand before the one that wants keys: a browser asks without one."""

        @web.middleware
        async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
            is_preflight = (
                request.method == "OPTIONS"
                and "Access-Control-Request-Method" in request.headers
                and self._allowed(request) is not None
            )
            if not is_preflight:
                return await handler(request)
            wanted = request.headers.get("Access-Control-Request-Headers", "*")
            return web.Response(
                status=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                    "Access-Control-Allow-Headers": wanted,
                    "Access-Control-Max-Age": _MAX_AGE_S,
                },
            )

        return answer_preflight

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `on_response_prepare`, so that errors and streams have them too."""
        allowed = self._allowed(request)
        if allowed is not None:
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = _SHOWN_HEADERS
        if self._origins and "*" not in self._origins:
            response.headers["Vary"] = "Origin"

    def _allowed(self, request: web.Request) -> str | None:
        """What the header says; None: it is left out."""
        origin = request.headers.get("Origin")
        if "*" in self._origins:
            return "*"
        return origin if origin in self._origins else None
