"""Who is calling: API keys and their limits, before anything of a request is looked at.

Without `--api_keys_file` everybody is `ANYBODY`: no limits, and the salt of a request is its own.
With it, every path but /health wants a key. A request that makes work counts against the key's
requests, and its tokens when they are known: prompts before they are run, output as it comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from xllm.security.api_keys import ApiKeys
from xllm.security.rate_limit import RateLimiter
from xllm.security.secret import ClusterSecret

_OPEN_PATHS = frozenset({"/health"})


class Caller:
    """Whose request it is."""

    def __init__(
        self,
        limiter: RateLimiter | None = None,
        secret: ClusterSecret | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`secret`: None where requests of all keys share their cache."""
        self._limiter = limiter
        self._secret = secret
        self._clock = clock

    def salt(self, request_salt: str) -> str:
        """The salt that the request's blocks get."""
        if self._limiter is None or self._secret is None:
            return request_salt
        return self._secret.salt(self._limiter.name, request_salt)

    def take_request(self) -> None:
        """Raises: RateLimited."""
        if self._limiter is not None:
            self._limiter.take_request(self._clock())

    def check_prompt(self, num_tokens: int) -> None:
        """Whether a request with so many tokens may run now. Raises: RateLimited."""
        if self._limiter is not None:
            self._limiter.check_prompt(num_tokens, self._clock())

    def take_tokens(self, num_tokens: int) -> None:
        """Of a request that runs."""
        if self._limiter is not None:
            self._limiter.take_tokens(num_tokens, self._clock())


ANYBODY = Caller()
CALLER = web.RequestKey("caller", Caller)


class Authenticator:
    """Knows the callers of one process."""

    def __init__(
        self,
        keys: ApiKeys,
        secret: ClusterSecret | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._secret = secret
        self._clock = clock

    @property
    def middleware(self) -> Middleware:
        """To stand behind the one that answers errors."""

        @web.middleware
        async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.path in _OPEN_PATHS:
                return await handler(request)
            limiter = self._keys.authenticate(_authorization(request))
            caller = request[CALLER] = Caller(limiter, self._secret, self._clock)
            if request.method == "POST":
                caller.take_request()
            return await handler(request)

        return authenticate


def _authorization(request: web.Request) -> str | None:
    """The header, or what Anthropic's clients send in its place."""
    if (key := request.headers.get("x-api-key")) is not None:
        return request.headers.get("Authorization", f"Bearer {key}")
    return request.headers.get("Authorization")
