"""Which addresses a process binds and tells others.

A process that others cannot reach must not register: that is found out here, at start-up, not by
a client's time-out.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from xllm.config import HostConfig
from xllm.errors import ConfigError, EtcdUnavailable

_BACKLOG = 1024
_RESOLVE_TIMEOUT_S = 5.0


def listen(host: str, port: int, *, flag: str) -> socket.socket:
    """A listening socket; the caller closes it. Port 0 is any free one.

    Raises: ConfigError naming `flag`, which gave the port, or `--host`.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host={host}: {error.strerror}; give an address") from error
    server = socket.socket(family, kind, protocol)
    try:
        # A restarted server may have its port back although old connections linger.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(_BACKLOG)
    except OSError as error:
        server.close()
        raise ConfigError(_why_not(error, host, port, flag)) from error
    server.setblocking(False)
    return server


def _why_not(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"--{flag}={port}: something else listens on {join_host_port(host, port)};"
            " stop it or choose another port"
        )
    if error.errno == errno.EACCES:
        return f"--{flag}={port}: not allowed to this user; choose a port from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host={host}: not an address of this machine"
    return f"--host={host} --{flag}={port}: {error.strerror}"


def bound_port(server: socket.socket) -> int:
    """The port of a socket from `listen`."""
    port: int = server.getsockname()[1]
    return port


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """The inverse of `join_host_port`; a scheme before the address is passed over.

    Raises: ValueError if there is no host or no port.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    if not url.hostname or url.port is None:
        raise ValueError(f"{address!r} is not host:port")
    return url.hostname, url.port


async def advertised_host(net: HostConfig, etcd_endpoints: Sequence[str]) -> str:
    """The host that this process registers, at which all that use the same etcd can reach it.

    It is `--advertise_host`, else `--host` if that is one address, else (it binds them all) the
    source address of the route to etcd: whoever reaches the same etcd can most likely reach that.

    Raises: ConfigError if etcd is on another machine and the host is only good on this one;
    EtcdUnavailable if no endpoint's name can be resolved.
    """
    etcd_hosts = [split_host_port(endpoint)[0] for endpoint in etcd_endpoints]
    etcd_is_here = all(is_loopback(etcd_host) for etcd_host in etcd_hosts)
    own = net.advertise_host or (None if _is_unspecified(net.host) else net.host)
    if etcd_is_here and own is not None:
        return own
    source = await _source_of_route(etcd_endpoints)
    host = own or source
    if etcd_is_here:
        return host
    if is_loopback(net.host):
        raise ConfigError(
            f"--host={net.host}: only this machine can reach it, but etcd is at"
            f" {', '.join(etcd_endpoints)}; use --host={source}, or --host=0.0.0.0"
        )
    if is_loopback(host):
        raise ConfigError(
            f"--advertise_host={host}: means another machine on each machine, but etcd is at"
            f" {', '.join(etcd_endpoints)}; use --advertise_host={source}"
        )
    return host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_unspecified(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


async def _source_of_route(endpoints: Sequence[str]) -> str:
    """The address from which this machine would talk to the first endpoint it has a route to."""
    loop = asyncio.get_running_loop()
    failures: list[str] = []
    for endpoint in endpoints:
        host, port = split_host_port(endpoint)
        try:
            async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = found[0]
            with socket.socket(family, kind, protocol) as probe:
                # Connecting a datagram socket sends nothing; it only picks the route.
                probe.connect(address)
                source: str = probe.getsockname()[0]
                return source
        except OSError as error:
            failures.append(f"{endpoint}: {error.strerror or 'not resolved in time'}")
    raise EtcdUnavailable(f"--etcd_addr: no route to {'; '.join(failures)}")
