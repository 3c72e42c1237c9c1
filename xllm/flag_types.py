"""What the value of a flag may look like: from its text to the field of a config, or why not.

Each type's `parse` raises ValueError with a message that goes on after `--flag=value: `.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class FlagType:
    """`shape` stands for the value in `--help`."""

    shape: str
    parse: Callable[[str], object]
    is_boolean: bool = False


def _boolean(value: str) -> bool:
    match value.lower():
        case "true" | "t" | "1" | "yes" | "y":
            return True
        case "false" | "f" | "0" | "no" | "n":
            return False
    raise ValueError("must be true or false")


BOOLEAN = FlagType("true|false", _boolean, is_boolean=True)


def choice(*allowed: str) -> FlagType:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return FlagType("|".join(allowed), parse)


def pattern(shape: str, regex: str, expected: str) -> FlagType:
    def parse(value: str) -> str:
        if not re.fullmatch(regex, value):
            raise ValueError(f"must be {expected}")
        return value

    return FlagType(shape, parse)


def integer(unit: str, low: int, high: int | None = None) -> FlagType:
    expected = f"from {low} to {high}" if high is not None else f"of at least {low}"

    def parse(value: str) -> int:
        if not re.fullmatch(r"-?\d+", value, re.ASCII):
            raise ValueError(f"must be a whole number {expected}")
        number = int(value)
        if number < low or (high is not None and number > high):
            raise ValueError(f"must be a whole number {expected}")
        return number

    return FlagType(unit, parse)


def decimal(unit: str, low: float, high: float) -> FlagType:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return number

    return FlagType(unit, parse)


_PREFIXES = "kmgt"
_MAX_SIZE = 1 << 60


def _size(value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?b)?|b)?", value, re.I | re.A)
    if match is None:
        raise ValueError("must be bytes, with a suffix if you like: 4GiB, 512M, 1.5GB")
    count, prefix, unit = match.groups()
    base = 1000 if (unit or "").lower() == "b" else 1024
    exponent = _PREFIXES.index(prefix.lower()) + 1 if prefix else 0
    num_bytes = float(count) * base**exponent
    if num_bytes > _MAX_SIZE:
        raise ValueError("is more than any machine has")
    return int(num_bytes)


SIZE = FlagType("BYTES", _size)
"""K, M, G, T and KiB, MiB, ... are powers of 1024; KB, MB, ... of 1000."""


def _host(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", value, re.ASCII):
        return value
    try:
        return str(ip_address(value))
    except ValueError:
        raise ValueError("must be a host name or an IP address, without a port") from None


HOST = FlagType("HOST", _host)


def _advertised_host(value: str) -> str:
    host = _host(value)
    try:
        unspecified = ip_address(host).is_unspecified
    except ValueError:
        unspecified = False
    if unspecified:
        raise ValueError("nobody can connect to it; give an address of this machine")
    return host


ADVERTISED_HOST = FlagType("HOST", _advertised_host)


def _etcd_addresses(value: str) -> str:
    for address in value.split(","):
        url = urlsplit(address if "://" in address else f"http://{address}")
        try:
            port = url.port
        except ValueError:
            port = None
        if (
            url.scheme not in ("http", "https")
            or not url.hostname
            or not port
            or url.path not in ("", "/")
            or url.username is not None
            or url.query
            or any(character.isspace() for character in address)
        ):
            raise ValueError(
                f"{address!r} must be host:port, http://host:port or https://host:port"
            )
    return value


ETCD_ADDRESSES = FlagType("HOST:PORT,...", _etcd_addresses)


def _collector(value: str) -> str:
    url = urlsplit(value)
    try:
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if not is_url or url.query or url.fragment or any(c.isspace() for c in value):
        raise ValueError("must be http://host:port or https://host:port")
    return value


COLLECTOR = FlagType("URL", _collector)


def _expanded(value: str) -> Path:
    """Raises: ValueError."""
    if "\0" in value:
        raise ValueError("must not contain a NUL")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no such user: {error}") from error


def _tokenizer_folder(value: str) -> str:
    folder = _expanded(value)
    try:
        is_there = (folder / "tokenizer.json").is_file()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ValueError(f"cannot be read: {error}") from error
    if not is_there:
        raise ValueError("must be a folder with a tokenizer.json, such as the model's")
    return str(folder)


TOKENIZER_FOLDER = FlagType("FOLDER", _tokenizer_folder)


def _text(value: str) -> str:
    if not value or any(character.isspace() for character in value):
        raise ValueError("must not be empty or contain spaces")
    return value


NAME = FlagType("NAME", _text)


def _path(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


MODEL = FlagType("FOLDER|ORG/NAME", _path)


FOLDER = FlagType("FOLDER", lambda value: str(_expanded(_path(value))))


FILE = FlagType("FILE", lambda value: str(_expanded(_path(value))))
