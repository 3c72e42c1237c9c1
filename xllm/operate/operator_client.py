"""HTTP to an operator port: `GET` and `POST` of JSON."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from xllm.errors import ConfigError, XllmError
from xllm.security.files import read_private_line

TIMEOUT_S = 10.0
_MIN_KEY_CHARS = 1
_CALLERS_FAULT = (400, 401, 403, 404, 413)


class NoAnswer(XllmError):
    """The operator port cannot be reached, or cannot do it now."""

    label = "no_answer"


class OperatorClient:
    """Of one master. Nothing is kept open between calls."""

    def __init__(self, url: str, key_file: str | None = None, ca_file: str | None = None) -> None:
        """`url`: http://host:port. `ca_file`: who signs its certificate; None: whom this machine
        trusts. Raises: ConfigError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--operator={url}: expected http://host:port or https://host:port")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._headers = {"Content-Type": "application/json"}
        if key_file is not None:
            key = read_private_line(key_file, "operator_key_file", _MIN_KEY_CHARS)
            self._headers["Authorization"] = f"Bearer {key}"
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca_file)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"--operator_ca={ca_file}: {error}") from error
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> dict[str, Any]:
        """Raises: ConfigError for what the caller has to change, NoAnswer."""
        return self._call(urllib.request.Request(self.url + path, headers=self._headers), TIMEOUT_S)

    def post(
        self, path: str, body: Mapping[str, Any], timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Raises: likewise."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        return self._call(request, timeout_s)

    def _call(self, request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                message = _message(error)
            if error.code in _CALLERS_FAULT:
                raise ConfigError(message) from error
            raise NoAnswer(f"{self.url}: {message}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NoAnswer(f"{self.url} does not answer: {reason}") from error
        if not isinstance(answer, dict):
            raise NoAnswer(f"{self.url}: not an operator port of xllm")
        return answer


def _message(error: urllib.error.HTTPError) -> str:
    """What went wrong, in the port's words."""
    if error.code == 401:
        return "the operator port wants its key: --operator_key_file"
    try:
        said = json.load(error)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
