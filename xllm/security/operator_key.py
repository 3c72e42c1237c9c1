"""The key for the operator port: `--operator_key_file`, one line."""

from __future__ import annotations

import hmac
import secrets

from xllm.security.files import read_private_line

MIN_KEY_CHARS = 16
_FLAG = "operator_key_file"


class OperatorKey:
    """The key of the file as it was last read; only its HMAC is kept."""

    def __init__(self, path: str) -> None:
        """Raises: ConfigError."""
        self._path = path
        self._pepper = secrets.token_bytes(32)
        self._digest = b""
        self.reload()

    def reload(self) -> None:
        """Raises: ConfigError; then the key is the one of before."""
        self._digest = self._hash(read_private_line(self._path, _FLAG, MIN_KEY_CHARS))

    def is_in(self, authorization: str | None) -> bool:
        """Whether a request's Authorization header has it."""
        scheme, _, key = (authorization or "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            self._hash(key.strip()), self._digest
        )

    def _hash(self, key: str) -> bytes:
        return hmac.digest(self._pepper, key.encode(errors="surrogateescape"), "sha256")
