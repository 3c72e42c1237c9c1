"""Who may use the public API: `--api_keys_file`, one key a line.

    # comment
    NAME:KEY [requests_per_minute=N] [tokens_per_minute=N]

A name may have several keys, so that one can replace another without a gap: they share a cache and
limits, which are stated on any one of its lines. A key without limits has those of the flags.

A key that is presented is looked up by its HMAC: `bearer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from xllm.errors import ConfigError, Unauthorized
from xllm.security.bearer import KeyHasher, presented_key
from xllm.security.files import read_private_file
from xllm.security.rate_limit import RateLimiter, RateLimits

MIN_KEY_CHARS = 16

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(rf"[\x21-\x7e]{{{MIN_KEY_CHARS},512}}")
_LIMIT = re.compile(r"(requests|tokens)_per_minute=([0-9]{1,12})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file. `limits`: what the line itself says."""

    name: str
    key: str
    limits: dict[str, int]


def parse_api_keys(text: str) -> list[ApiKey]:
    """Raises: ConfigError, naming the line and nothing of it: any part may be a key."""
    parsed: list[ApiKey] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        name, colon, key = fields[0].partition(":")
        if not colon or not _NAME.fullmatch(name):
            raise ConfigError(
                f"line {number}: expected NAME:KEY, with a name of up to 64 letters, digits, '.',"
                " '_' and '-'"
            )
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"line {number}: a key must have {MIN_KEY_CHARS} to 512 visible ASCII characters"
            )
        if key in seen:
            raise ConfigError(f"line {number}: the same key as on line {seen[key]}")
        seen[key] = number
        limits: dict[str, int] = {}
        for field in fields[1:]:
            found = _LIMIT.fullmatch(field)
            if found is None:
                raise ConfigError(
                    f"line {number}: after the key, expected requests_per_minute=N or"
                    " tokens_per_minute=N"
                )
            limits[found[1]] = int(found[2])
        parsed.append(ApiKey(name, key, limits))
    if not parsed:
        raise ConfigError("no key in it; expected lines of NAME:KEY")
    return parsed


def limits_by_name(keys: list[ApiKey], default: RateLimits) -> dict[str, RateLimits]:
    """Raises: ConfigError where two lines of one name disagree."""
    stated: dict[str, dict[str, int]] = {}
    for key in keys:
        own = stated.setdefault(key.name, {})
        for kind, number in key.limits.items():
            if own.setdefault(kind, number) != number:
                raise ConfigError(f"{key.name} has two limits of {kind}_per_minute")
    return {name: replace(default, **own) for name, own in stated.items()}


class ApiKeys:
    """The keys of the file as it was last read."""

    def __init__(self, path: str, default: RateLimits, clock: Callable[[], float]) -> None:
        """Raises: ConfigError."""
        self._path = path
        self._default = default
        self._clock = clock
        self._hasher = KeyHasher()
        self._limiters: dict[str, RateLimiter] = {}
        self._names: dict[bytes, str] = {}
        """By the HMAC of a key."""
        self.reload()

    @property
    def num_keys(self) -> int:
        return len(self._names)

    def reload(self) -> None:
        """Reads the file again. A name whose limits are as before keeps what it has used.

        Raises: ConfigError; then the keys are those of before.
        """
        text = read_private_file(self._path, "api_keys_file")
        try:
            keys = parse_api_keys(text)
            limits = limits_by_name(keys, self._default)
        except ConfigError as error:
            raise ConfigError(f"--api_keys_file={self._path}: {error}") from error
        now = self._clock()
        limiters = {}
        for name, limit in limits.items():
            before = self._limiters.get(name)
            same = before is not None and before.limits == limit
            limiters[name] = before if same and before else RateLimiter(name, limit, now)
        self._limiters = limiters
        self._names = {self._hasher.digest(key.key): key.name for key in keys}

    def authenticate(self, authorization: str | None) -> RateLimiter:
        """Whose key a request's Authorization header has.

        Raises: Unauthorized.
        """
        key = presented_key(authorization)
        if not key:
            raise Unauthorized(
                "You didn't provide an API key. You need to provide your API key in an"
                " Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
        name = self._names.get(self._hasher.digest(key))
        if name is None:
            raise Unauthorized("Incorrect API key provided.", code="invalid_api_key")
        return self._limiters[name]
