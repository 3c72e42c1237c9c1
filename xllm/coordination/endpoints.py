"""Where etcd is: `--etcd_addr` parsed, host names resolved.

Names are resolved here and not by gRPC, whose own resolver follows proxies and resolver settings
of the environment; addresses are tried IPv4 first, because etcd's default binds only that.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from xllm.errors import ConfigError, EtcdUnavailable

MAX_RESPONSE_BYTES = 64 << 20
"""A page of keys (see `client.PAGE_KEYS`); gRPC's default of 4 MiB holds two large ones."""

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # Else channels of the whole process to one address share their connection and its back-off.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_endpoints(etcd_addr: str) -> tuple[Endpoint, ...]:
    """Comma-separated `host:port`, `http://host:port`, `https://host:port`; port 2379 by default.

    Raises: ConfigError, naming the part that is wrong.
    """
    endpoints = tuple(_parse(part.strip()) for part in etcd_addr.split(",") if part.strip())
    if not endpoints:
        raise ConfigError("--etcd_addr names no endpoint: expected host:port[,host:port...]")
    return endpoints


def _parse(text: str) -> Endpoint:
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise ConfigError(f"--etcd_addr has {text!r}: expected http:// or https://, not {scheme}")
    rest = rest.rstrip("/")
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = rest.partition(":")
    port = port or "2379"
    wrong = not host or "/" in rest or not port.isdecimal() or not 0 < int(port) < 65536
    if wrong or not _is_name(host):
        raise ConfigError(f"--etcd_addr has {text!r}: expected host:port")
    return Endpoint(host, int(port), tls=scheme == "https")


def _is_name(host: str) -> bool:
    try:
        host.encode("idna")
    except UnicodeError:  # an empty label, or one of more than 63 characters
        return False
    return True


def channel_options() -> list[tuple[str, int | str]]:
    """Of every channel to etcd; the caller's own."""
    return list(_OPTIONS)


async def resolve(endpoint: Endpoint, timeout_s: float) -> str:
    """The address that the endpoint's name has now, as gRPC spells it.

    Raises: EtcdUnavailable if the name cannot be resolved in time.
    """
    if endpoint.host == "localhost":
        return f"ipv4:127.0.0.1:{endpoint.port}"
    try:
        async with asyncio.timeout(timeout_s):
            found = await asyncio.get_running_loop().getaddrinfo(
                endpoint.host, endpoint.port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError) as error:
        raise EtcdUnavailable(f"etcd at {endpoint}: the name cannot be resolved: {error}") from None
    return _target(found)


def _target(found: Sequence[tuple[int, int, int, str, tuple[object, ...]]]) -> str:
    family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    if family == socket.AF_INET6:
        return f"ipv6:[{address[0]}]:{address[1]}"
    return f"ipv4:{address[0]}:{address[1]}"
