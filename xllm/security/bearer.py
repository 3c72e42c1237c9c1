"""Keys that requests present: `Authorization: Bearer KEY`.

A key is compared by its HMAC under a key that is random per process: how long that takes says
nothing about which keys there are. Keys are not kept, only these HMACs.
"""

from __future__ import annotations

import hmac
import secrets


def presented_key(authorization: str | None) -> str:
    """The key in a request's Authorization header; empty: it has none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


class KeyHasher:
    """Of one process and purpose."""

    def __init__(self) -> None:
        self._pepper = secrets.token_bytes(32)

    def digest(self, key: str) -> bytes:
        return hmac.digest(self._pepper, key.encode(errors="surrogateescape"), "sha256")
