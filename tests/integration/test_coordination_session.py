"""A lease and its keys: lost and found, fenced, closed, and through a cut wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import pytest
from etcd_server import EtcdServer, Wire, until

from xllm.coordination import DELETE, EtcdClient, Fenced, KeyValue, Session, watch_prefix
from xllm.protocol import Epoch

KEY = "/t/workers/a"
LOAD = "/t/load/a"


def epoch_value(epoch: Epoch) -> bytes:
    return str(epoch).encode()


@asynccontextmanager
async def running(session: Session) -> AsyncIterator[None]:
    task = asyncio.create_task(session.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await session.close()


async def test_a_session_that_loses_its_lease_registers_again_under_a_new_epoch(
    client: EtcdClient,
) -> None:
    session = Session(client, 1.0)
    epochs: list[Epoch] = []
    session.on_new_epoch(epochs.append)
    async with running(session):
        await session.register(KEY, epoch_value, exclusive=True)
        await session.register(LOAD, b"1")
        await session.update(LOAD, b"2")
        first = session.epoch
        assert epochs == []
        await client.revoke(first)
        assert (await client.range("/t/")).kvs == ()

        async def back() -> bool:
            return len((await client.range("/t/")).kvs) == 2

        await until(back)
        assert session.epoch != first
        assert epochs == [session.epoch]
        assert session.alive
        worker, load = await client.get(KEY), await client.get(LOAD)
        assert worker is not None
        assert load is not None
        assert (worker.value, worker.lease) == (epoch_value(session.epoch), session.epoch)
        assert (load.value, load.lease) == (b"2", session.epoch)
        assert await session.fenced_put("/t/cache", b"") is True
        assert await session.fenced_txn([], epoch=first) is False


async def test_closing_a_session_deletes_its_keys(client: EtcdClient) -> None:
    session = Session(client, 60.0)
    async with running(session):
        await session.register(KEY, b"", exclusive=True)
        await session.register(LOAD, b"")
        await session.unregister(LOAD)
        assert [kv.key for kv in (await client.range("/t/")).kvs] == [KEY]
    assert (await client.range("/t/")).kvs == ()
    assert not session.alive


async def test_a_cut_off_session_knows_that_it_is_dead_before_its_keys_go(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire:
        far = EtcdClient([wire.address], timeout_s=0.5)
        session = Session(far, 1.0)
        async with running(session), aclosing(watch_prefix(client, "/t/")) as items:
            await session.register(KEY, epoch_value, exclusive=True)
            await anext(items)
            first = session.epoch
            await asyncio.sleep(1.2)  # longer than the TTL: the keepalives have to work
            assert session.alive
            wire.cut()
            await session.update(KEY, lambda epoch: b"late" + epoch_value(epoch))
            async for item in items:
                assert isinstance(item, list)
                if item[0].kind is DELETE:
                    assert not session.alive
                    break
            wire.mend()
            back = await anext(items)
            assert isinstance(back, list)
            kv = back[0].kv
            assert kv.lease == session.epoch != first
            assert kv.value == b"late" + epoch_value(session.epoch)
        await far.close()


async def test_alive_is_told_by_the_local_clock_alone(client: EtcdClient) -> None:
    now = 0.0
    session = Session(client, 5.0, clock=lambda: now)
    assert not session.alive
    await session.register(KEY, b"")
    now = 4.99
    assert session.alive
    now = 5.0
    assert not session.alive
    await session.close()


async def test_a_key_held_by_a_live_process_fences_another_one(client: EtcdClient) -> None:
    owner, rival = Session(client, 1.0), Session(client, 1.0)
    async with running(owner), running(rival):
        await owner.register(KEY, b"owner", exclusive=True)
        with pytest.raises(Fenced, match=KEY):
            await rival.register(KEY, b"rival", exclusive=True)
        kv = await client.get(KEY)
        assert kv is not None
        assert kv.value == b"owner"
        assert owner.alive


async def test_a_dead_predecessor_is_waited_for(client: EtcdClient) -> None:
    dead = Session(client, 1.0)
    await dead.register(KEY, b"dead", exclusive=True)
    heir = Session(client, 1.0)
    async with running(heir):
        async with asyncio.timeout(3.0):
            await heir.register(KEY, b"heir", exclusive=True)
        kv = await client.get(KEY)
        assert kv is not None
        assert (kv.value, kv.lease) == (b"heir", heir.epoch)
        assert await dead.fenced_put(LOAD, b"") is False
        assert await client.get(LOAD) is None


async def test_a_session_whose_key_was_taken_meanwhile_ends_fenced(client: EtcdClient) -> None:
    loser, winner = Session(client, 1.0), Session(client, 1.0)
    await loser.register(KEY, b"loser", exclusive=True)
    await client.revoke(loser.epoch)
    async with running(winner):
        await winner.register(KEY, b"winner", exclusive=True)
        async with asyncio.timeout(5.0):
            with pytest.raises(Fenced):
                await loser.run()
    await loser.close()


async def test_without_its_exclusive_key_a_session_writes_nothing_until_it_is_back(
    client: EtcdClient,
) -> None:
    session = Session(client, 1.0)
    await session.register(KEY, b"", exclusive=True)
    await session.register(LOAD, b"1")
    await client.delete(KEY)
    await session.update(LOAD, b"2")
    load = await client.get(LOAD)
    assert load is not None
    assert load.value == b"1"
    async with running(session):

        async def written() -> bool:
            load = await client.get(LOAD)
            return load is not None and load.value == b"2"

        await until(written)
        kv = await client.get(KEY)
        assert kv is not None
        assert kv.lease == session.epoch


async def test_updates_in_a_row_end_with_the_last_value(client: EtcdClient) -> None:
    session = Session(client, 1.0)
    count = 0

    def value(_: Epoch) -> bytes:
        return b"%d" % count

    await session.register(LOAD, value)
    updates = []
    for number in range(1, 6):
        count = number
        updates.append(asyncio.create_task(session.update(LOAD, value)))
        await asyncio.sleep(0)
    await asyncio.gather(*updates)
    kv = await client.get(LOAD)
    assert kv is not None
    assert kv.value == b"5"
    await session.close()


async def test_a_grant_whose_answer_was_lost_is_taken_up(client: EtcdClient) -> None:
    session = Session(client, 60.0)
    await client.grant(session.epoch, 60)
    await session.register(KEY, epoch_value, exclusive=True)
    assert not session.alive  # nobody knows since when it lives
    async with running(session):
        await until(lambda: session.alive, within_s=2.0)
        kv = await client.get(KEY)
        assert kv is not None
        assert kv.lease == session.epoch


async def test_a_key_without_a_lease_is_taken_over(client: EtcdClient) -> None:
    await client.put(KEY, b"left by hand")
    session = Session(client, 1.0)
    await session.register(KEY, b"ours", exclusive=True)
    kv = await client.get(KEY)
    assert isinstance(kv, KeyValue)
    assert (kv.value, kv.lease) == (b"ours", session.epoch)
    await session.close()


async def test_a_wiped_etcd_gets_every_key_again(etcd: EtcdServer, client: EtcdClient) -> None:
    session = Session(client, 1.0)
    async with running(session), aclosing(watch_prefix(client, "/t/")) as items:
        await session.register(KEY, epoch_value, exclusive=True)
        await session.register(LOAD, b"1")
        first = session.epoch
        await asyncio.to_thread(etcd.wipe)
        await asyncio.to_thread(etcd.start)

        async def back() -> bool:
            return len((await client.range("/t/")).kvs) == 2

        await until(back)
        assert session.epoch != first
        state: dict[str, int] = {}
        async with asyncio.timeout(5.0):
            async for item in items:
                if not isinstance(item, list):
                    state = {kv.key: kv.lease for kv in item.kvs}
                else:
                    state |= {change.kv.key: change.kv.lease for change in item}
                if state == {KEY: session.epoch, LOAD: session.epoch}:
                    break
