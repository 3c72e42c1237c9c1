"""The key for the operator port: `--operator_key_file`, one line."""

from __future__ import annotations

import hmac

from xllm.security.bearer import KeyHasher, presented_key
from xllm.security.files import read_private_line

MIN_KEY_CHARS = 16
_FLAG = "operator_key_file"


class OperatorKey:
    """The key of the file as it was last read; only its HMAC is kept."""

    def __init__(self, path: str) -> None:
        """Raises: ConfigError."""
        self._path = path
        self._hasher = KeyHasher()
        self._digest = b""
        self.reload()

    def reload(self) -> None:
        """Raises: ConfigError; then the key is the one of before."""
        self._digest = self._hasher.digest(read_private_line(self._path, _FLAG, MIN_KEY_CHARS))

    def is_in(self, authorization: str | None) -> bool:
        """Whether a request's Authorization header has it."""
        return hmac.compare_digest(self._hasher.digest(presented_key(authorization)), self._digest)
