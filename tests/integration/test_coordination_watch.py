"""Whatever happens to the connection, what a watch yields adds up to the state in etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from etcd_server import EtcdServer, Wire

from xllm.coordination import (
    DELETE,
    PUT,
    Change,
    EtcdClient,
    Put,
    Snapshot,
    endpoints,
    watch_prefix,
)

Items = AsyncGenerator[Snapshot | list[Change], None]


@asynccontextmanager
async def watching_through(wire: Wire) -> AsyncIterator[Items]:
    """A watch of /t/ over the wire, its first Snapshot read."""
    far = EtcdClient([wire.address], timeout_s=2.0)
    async with aclosing(watch_prefix(far, "/t/")) as items:
        assert isinstance(await anext(items), Snapshot)
        yield items
    await far.close()


async def take_changes(items: Items, count: int) -> list[Change]:
    """The next `count` changes; a Snapshot among them fails."""
    changes: list[Change] = []
    async with asyncio.timeout(20.0):
        while len(changes) < count:
            item = await anext(items)
            assert isinstance(item, list)
            changes += item
    return changes


async def put_many(client: EtcdClient, count: int, value: bytes) -> list[str]:
    """One revision each; returns the keys in the order of their revisions."""
    keys = [f"/t/{i:05}" for i in range(count)]
    for key in keys:
        await client.put(key, value)
    return keys


async def test_a_connection_cut_during_catch_up_loses_and_repeats_nothing(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire, watching_through(wire) as items:
        first = await client.put("/t/first", b"")
        await take_changes(items, 1)
        wire.cut()
        keys = await put_many(client, 3000, bytes(100))
        # etcd sends 1,000 revisions at a time, here 140 kB: every connection dies in its second.
        wire.cut_every(200_000)
        wire.mend()
        seen = await take_changes(items, 3000)
        assert wire.cuts >= 3
        assert [change.kv.key for change in seen] == keys
        assert [change.kv.mod_revision for change in seen] == [first + 1 + i for i in range(3000)]


async def test_a_catch_up_of_many_megabytes_comes_in_pieces(
    etcd: EtcdServer, client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC's own limit for a message, 4 MiB, has to do.
    options = tuple(o for o in endpoints._OPTIONS if o[0] != "grpc.max_receive_message_length")
    monkeypatch.setattr(endpoints, "_OPTIONS", options)
    async with Wire(etcd.port) as wire, watching_through(wire) as items:
        await client.put("/t/first", b"")
        await take_changes(items, 1)
        wire.cut()
        keys = await put_many(client, 12, bytes(1_000_000))
        wire.mend()
        seen = await take_changes(items, 12)
        assert [change.kv.key for change in seen] == keys
        assert all(change.kv.value == bytes(1_000_000) for change in seen)


async def test_a_transaction_is_never_split_and_a_delete_names_its_key(
    client: EtcdClient,
) -> None:
    async with aclosing(watch_prefix(client, "/t/")) as items:
        await anext(items)
        await client.txn([], [Put("/t/a", b"1"), Put("/t/b", b"2"), Put("/u/c", b"3")])
        batch = await anext(items)
        assert isinstance(batch, list)
        assert [(c.kind, c.kv.key, c.kv.value) for c in batch] == [
            (PUT, "/t/a", b"1"),
            (PUT, "/t/b", b"2"),
        ]
        await client.delete("/t/a")
        batch = await anext(items)
        assert isinstance(batch, list)
        assert [(c.kind, c.kv.key) for c in batch] == [(DELETE, "/t/a")]


async def test_compaction_during_a_cut_brings_a_fresh_snapshot(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire, watching_through(wire) as items:
        await client.put("/t/a", b"")
        await client.put("/t/b", b"")
        await take_changes(items, 2)
        wire.cut()
        await client.delete("/t/a")
        revision = await client.put("/t/c", b"")
        await client.compact(revision)
        wire.mend()
        snapshot = await next_snapshot(items)
        assert [kv.key for kv in snapshot.kvs] == ["/t/b", "/t/c"]
        await client.put("/t/d", b"")
        assert [change.kv.key for change in await take_changes(items, 1)] == ["/t/d"]


async def test_a_quiet_prefix_is_watched_although_its_history_is_compacted(
    client: EtcdClient,
) -> None:
    await client.put("/t/a", b"")
    await client.put("/u/other", b"")
    await client.compact(await client.put("/u/other", b""))
    async with aclosing(watch_prefix(client, "/t/")) as items:
        assert isinstance(await anext(items), Snapshot)
        await client.delete("/t/a")
        assert [change.kind for change in await take_changes(items, 1)] == [DELETE]


async def test_a_deleted_witness_still_proves_a_common_history(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire, watching_through(wire) as items:
        await client.put("/t/a", b"")
        await client.delete("/t/a")
        await take_changes(items, 2)
        wire.cut()
        await client.put("/t/b", b"")
        wire.mend()
        assert [change.kv.key for change in await take_changes(items, 1)] == ["/t/b"]


async def test_a_wiped_etcd_brings_a_fresh_snapshot(etcd: EtcdServer, client: EtcdClient) -> None:
    async with aclosing(watch_prefix(client, "/t/")) as items:
        await anext(items)
        await put_many(client, 10, b"")
        await take_changes(items, 10)
        await asyncio.to_thread(etcd.wipe)
        await asyncio.to_thread(etcd.start)
        snapshot = await next_snapshot(items)
        assert snapshot.kvs == ()
        assert snapshot.revision < 10


async def test_a_wiped_etcd_is_noticed_even_if_its_revision_has_overtaken(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire, watching_through(wire) as items:
        await put_many(client, 10, b"before")
        await take_changes(items, 10)
        wire.cut()
        await asyncio.to_thread(etcd.wipe)
        await asyncio.to_thread(etcd.start)
        await put_many(client, 20, b"after")
        wire.mend()
        snapshot = await next_snapshot(items)
        assert [kv.value for kv in snapshot.kvs] == [b"after"] * 20


async def test_a_watch_of_nothing_resumes_after_a_cut(etcd: EtcdServer, client: EtcdClient) -> None:
    async with Wire(etcd.port) as wire, watching_through(wire) as items:
        reading = asyncio.create_task(anext(items))
        await asyncio.sleep(0.1)
        wire.cut()
        await client.put("/t/a", b"")
        wire.mend()
        async with asyncio.timeout(5.0):
            item = await reading
        assert isinstance(item, list)
        assert [change.kv.key for change in item] == ["/t/a"]


async def test_a_watch_of_nothing_notices_a_wiped_etcd(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    await put_many(client, 10, b"")
    await client.delete_prefix("/t/")
    async with aclosing(watch_prefix(client, "/t/")) as items:
        await anext(items)
        await asyncio.to_thread(etcd.wipe)
        await asyncio.to_thread(etcd.start)
        assert (await next_snapshot(items)).revision < 10


async def test_a_cancelled_watch_leaves_nothing_behind(client: EtcdClient) -> None:
    async def consume() -> None:
        async with aclosing(watch_prefix(client, "/t/")) as items:
            async for _ in items:
                pass

    before = asyncio.all_tasks()
    consumer = asyncio.create_task(consume())
    await asyncio.sleep(0.1)
    consumer.cancel()
    await asyncio.gather(consumer, return_exceptions=True)
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before


async def next_snapshot(items: Items) -> Snapshot:
    """The next item, which has to be a Snapshot, within seconds."""
    async with asyncio.timeout(5.0):
        item = await anext(items)
    assert isinstance(item, Snapshot)
    return item
