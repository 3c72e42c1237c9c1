"""Calls: paging, transactions, limits, names, an etcd that is not there or is full."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from etcd_server import EtcdServer, free_port, until

from xllm.coordination import (
    Compacted,
    CompareCreateRevision,
    CompareLease,
    CompareModRevision,
    Delete,
    DeleteRange,
    EtcdClient,
    EtcdNoSpace,
    Get,
    LeaseExists,
    LeaseNotFound,
    Put,
    RequestTooLarge,
)
from xllm.coordination import client as client_module
from xllm.coordination.client import MAX_REQUEST_BYTES, PAGE_KEYS
from xllm.errors import EtcdUnavailable


async def test_a_range_is_one_revision_over_all_its_pages(client: EtcdClient) -> None:
    num_keys = 2 * PAGE_KEYS + 7
    ops = [Put(f"/t/{i:05}", b"old") for i in range(num_keys)]
    for start in range(0, num_keys, 100):
        await client.txn([], ops[start : start + 100])
    written = await client.get("/t/00000")
    assert written is not None

    async def overwrite() -> None:
        for i in reversed(range(num_keys)):
            await client.put(f"/t/{i:05}", b"new")

    writer = asyncio.create_task(overwrite())
    await asyncio.sleep(0.02)
    snapshot = await client.range("/t/")
    await writer
    assert [kv.key for kv in snapshot.kvs] == [f"/t/{i:05}" for i in range(num_keys)]
    assert all(kv.mod_revision <= snapshot.revision for kv in snapshot.kvs)
    num_new = sum(kv.value == b"new" for kv in snapshot.kvs)
    # One put per revision, from the end: exactly those up to the snapshot's revision are new.
    last_txn_revision = max(kv.create_revision for kv in snapshot.kvs)
    assert num_new == snapshot.revision - last_txn_revision


async def test_a_txn_compares_before_it_writes(client: EtcdClient) -> None:
    first = await client.txn([CompareCreateRevision("/t/a", 0)], [Put("/t/a", b"1")])
    again = await client.txn([CompareCreateRevision("/t/a", 0)], [], [Get("/t/a"), Get("/t/b")])
    assert (first.succeeded, again.succeeded) == (True, False)
    kv, absent = again.gets
    assert absent is None
    assert kv is not None
    assert kv.value == b"1"
    assert (await client.txn([CompareLease("/t/a", 5)], [])).succeeded is False
    done = await client.txn(
        [CompareModRevision("/t/a", kv.mod_revision)],
        [Delete("/t/a"), Put("/t/b", b""), Put("/t/c", b"")],
    )
    assert done.succeeded
    await client.txn([], [DeleteRange("/t/b", "/t/c")])
    assert [kv.key for kv in (await client.range("/t/")).kvs] == ["/t/c"]
    assert await client.delete("/t/c") is True
    assert await client.delete("/t/c") is False
    assert await client.delete_prefix("/t/") == 0


async def test_what_etcd_refuses_has_a_name(client: EtcdClient) -> None:
    too_large = bytes(MAX_REQUEST_BYTES)
    with pytest.raises(RequestTooLarge, match="etcd takes 1572864"):
        await client.put("/t/a", too_large)
    with pytest.raises(RequestTooLarge, match="split it"):
        await client.txn([], [Put("/t/a", too_large)])
    with pytest.raises(LeaseNotFound):
        await client.put("/t/a", b"", lease_id=77)
    with pytest.raises(LeaseNotFound):
        await client.revoke(77)
    assert await client.time_to_live(77) == -1
    assert await client.keep_alive(77, attempt_s=1.0, timeout_s=1.0) == 0
    assert await client.grant(78, 60) == 60
    with pytest.raises(LeaseExists):
        await client.grant(78, 60)
    old = await client.put("/t/a", b"")
    await client.compact(await client.put("/t/a", b""))
    with pytest.raises(Compacted):
        await client.get("/t/a", revision=old)


@pytest.mark.parametrize("address", ["localhost:{}", "http://localhost:{}/", "http://127.0.0.1:{}"])
async def test_an_endpoint_may_be_a_name_or_a_url(etcd: EtcdServer, address: str) -> None:
    client = EtcdClient([address.format(etcd.port)])
    await client.connect(5.0)
    assert await client.put("/t/a", b"x") > 0
    await client.close()


async def test_a_name_is_looked_up_again_after_a_failure(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo
    address: str | None = None

    async def getaddrinfo(host: str, port: int, **options: Any) -> Any:
        assert host == "etcd.example"
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return await look_up(address, port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(client_module, "RESOLVE_AGAIN_S", 0.0)
    client = EtcdClient([f"etcd.example:{etcd.port}"])
    with pytest.raises(EtcdUnavailable, match=r"etcd\.example:\d+: the name cannot be resolved"):
        await client.ping(0.2)
    address = "127.0.0.2"
    with pytest.raises(EtcdUnavailable, match="refused"):
        await client.ping(0.2)
    address = "127.0.0.1"
    await client.ping(2.0)
    await client.close()


async def test_a_client_waits_for_etcd_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = EtcdServer(tmp_path)
    client = EtcdClient([server.address])
    connecting = asyncio.create_task(client.connect(10.0))
    try:
        await until(lambda: "waiting for etcd" in caplog.text)
        await asyncio.to_thread(server.start)
        await connecting
        assert caplog.text.count("waiting for etcd") == 1
    finally:
        connecting.cancel()
        await client.close()
        server.kill()


async def test_no_etcd_is_an_error_in_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    client = EtcdClient([address], timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(EtcdUnavailable, match="--etcd_addr"):
        await client.connect(0.5)
    with pytest.raises(EtcdUnavailable, match=address):
        await client.put("/t/a", b"")
    assert time.monotonic() - started < 2.0
    await client.close()


async def test_a_call_moves_on_from_an_endpoint_that_is_dead(etcd: EtcdServer) -> None:
    client = EtcdClient([f"127.0.0.1:{free_port()}", etcd.address])
    started = time.monotonic()
    await client.put("/t/a", b"")
    assert time.monotonic() - started < 1.0
    await client.close()


async def test_a_full_quota_is_told_apart_and_reads_go_on(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, "--quota-backend-bytes=1000000")
    server.start()
    client = EtcdClient([server.address])
    try:

        async def fill() -> None:
            # etcd measures what it has committed to disk, which may lag far behind the puts.
            for i in range(2000):
                await client.put(f"/t/{i}", bytes(100_000))

        with pytest.raises(EtcdNoSpace):
            await fill()
        with pytest.raises(EtcdNoSpace):
            await client.grant(1, 5)
        status = await client.status()
        assert status.no_space
        assert status.db_size_bytes > 900_000
        assert (await client.range("/t/")).kvs
    finally:
        await client.close()
        server.kill()
