from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from xllm import net
from xllm.config import HostConfig
from xllm.errors import ConfigError, EtcdUnavailable

LOCAL_ETCD = ["127.0.0.1:2379", "http://localhost:2379"]
REMOTE_ETCD = ["https://203.0.113.1:2379"]


@pytest.fixture
def taken() -> Iterator[int]:
    with net.listen("127.0.0.1", 0, flag="port") as server:
        yield net.bound_port(server)


def test_listen_accepts_connections(taken: int) -> None:
    socket.create_connection(("127.0.0.1", taken), timeout=1).close()


def test_a_port_that_is_taken_is_named_with_its_flag(taken: int) -> None:
    with pytest.raises(ConfigError, match=f"--http_server_port={taken}: something else listens"):
        net.listen("127.0.0.1", taken, flag="http_server_port")


def test_a_foreign_address_is_refused_with_the_host_flag() -> None:
    with pytest.raises(ConfigError, match=r"--host=203\.0\.113\.1: not an address of this machine"):
        net.listen("203.0.113.1", 0, flag="port")


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [("a.b", 1, "a.b:1"), ("1.2.3.4", 5, "1.2.3.4:5"), ("::1", 6, "[::1]:6")],
)
def test_host_and_port_are_joined_and_split(host: str, port: int, text: str) -> None:
    assert net.join_host_port(host, port) == text
    assert net.split_host_port(text) == (host, port)
    assert net.split_host_port(f"https://{text}") == (host, port)


@pytest.mark.parametrize("address", ["host", ":1", "host:", "", "http://host", "host:x"])
def test_what_is_not_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # urlsplit's own message for a bad port
        net.split_host_port(address)


@pytest.mark.parametrize(
    ("config", "etcd", "advertised"),
    [
        (HostConfig(), LOCAL_ETCD, "127.0.0.1"),
        (HostConfig(host="0.0.0.0"), LOCAL_ETCD, "127.0.0.1"),
        (HostConfig(host="203.0.113.9"), LOCAL_ETCD, "203.0.113.9"),
        (HostConfig(advertise_host="name"), LOCAL_ETCD, "name"),
        (HostConfig(host="0.0.0.0"), REMOTE_ETCD, "198.51.100.7"),
        (HostConfig(host="::"), REMOTE_ETCD, "198.51.100.7"),
        (HostConfig(host="203.0.113.9"), REMOTE_ETCD, "203.0.113.9"),
        (HostConfig(host="0.0.0.0", advertise_host="name"), REMOTE_ETCD, "name"),
    ],
)
async def test_advertised_host(
    monkeypatch: pytest.MonkeyPatch, config: HostConfig, etcd: list[str], advertised: str
) -> None:
    if etcd is REMOTE_ETCD:
        monkeypatch.setattr(net, "_source_of_route", _fixed_source)
    assert await net.advertised_host(config, etcd) == advertised


async def _fixed_source(endpoints: list[str]) -> str:
    return "198.51.100.7"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HostConfig(), "--host=127.0.0.1: .* use --host=198.51.100.7"),
        (HostConfig(advertise_host="198.51.100.7"), "--host=127.0.0.1: "),
        (
            HostConfig(host="0.0.0.0", advertise_host="localhost"),
            "--advertise_host=localhost: .* use --advertise_host=198.51.100.7",
        ),
    ],
)
async def test_loopback_with_a_remote_etcd_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: HostConfig, message: str
) -> None:
    monkeypatch.setattr(net, "_source_of_route", _fixed_source)
    with pytest.raises(ConfigError, match=message):
        await net.advertised_host(config, REMOTE_ETCD)


async def test_an_etcd_whose_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with pytest.raises(EtcdUnavailable, match="no route to etcd:2379: Name or service not known"):
        await net.advertised_host(HostConfig(host="0.0.0.0"), ["etcd:2379"])
