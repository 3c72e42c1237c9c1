"""Serves an HTTP application on a bound socket, within bounds, with or without TLS."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from xllm.security.tls import HANDSHAKE_S

logger = logging.getLogger(__name__)

RESERVED_FILES = 256
"""For everything else of the process: workers, etcd, the cache."""

MIN_CONNECTIONS = 64
_BACKLOG = 1024


def max_connections() -> int:
    """As many clients as there are files for: more would keep the process from its workers."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(MIN_CONNECTIONS, limit - RESERVED_FILES)


@asynccontextmanager
async def serve(
    runner: web.AppRunner,
    listening: socket.socket,
    tls: ssl.SSLContext | None = None,
    limit: int | None = None,
) -> AsyncIterator[None]:
    """Serves until the context is left; `limit` connections at a time, others are closed."""
    most = max_connections() if limit is None else limit
    await runner.setup()
    try:
        application = runner.server
        assert application is not None

        def accept() -> asyncio.BaseProtocol:
            if len(application.connections) >= most:
                logger.warning("connection_refused reason='%d are open'", most)
                return _Refusal()
            return application()

        server = await asyncio.get_running_loop().create_server(
            accept,
            sock=listening,
            backlog=_BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
        )
        try:
            yield
        finally:
            server.close()
    finally:
        await runner.cleanup()


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
