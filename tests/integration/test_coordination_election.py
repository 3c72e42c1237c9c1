"""One leader at a time, and a new one soon after it is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from etcd_server import EtcdServer, Wire, until

from xllm.coordination import Election, EtcdClient, Session

KEY = "/t/leader"
TTL_S = 1.0


@asynccontextmanager
async def candidate(client: EtcdClient, name: bytes) -> AsyncIterator[tuple[Session, Election]]:
    session = Session(client, TTL_S)
    election = Election(session, KEY, name)
    tasks = [asyncio.create_task(session.run()), asyncio.create_task(election.run())]
    try:
        yield session, election
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await session.close()


async def test_a_leader_that_resigns_is_replaced_at_once(client: EtcdClient) -> None:
    await client.put("/t/leader-of-others", b"")  # only starts with the key's name
    async with candidate(client, b"a") as (session, first):
        await until(lambda: first.is_leader)
        async with candidate(client, b"b") as (_, second):
            await until(lambda: second.leader == b"a")
            assert not second.is_leader
            assert await first.update(b"a2") is True
            assert await second.update(b"b2") is False
            await until(lambda: second.leader == b"a2")
            await session.close()
            await until(lambda: second.is_leader, within_s=0.5)
            assert not first.is_leader
            assert second.leader == b"b2"


async def test_a_leader_that_is_cut_off_hands_over_within_two_ttls(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    async with Wire(etcd.port) as wire:
        far = EtcdClient([wire.address], timeout_s=0.5)
        async with candidate(far, b"far") as (_, lost):
            await until(lambda: lost.is_leader)
            async with candidate(client, b"near") as (_, heir):
                await until(lambda: heir.leader == b"far")
                wire.cut()
                cut_at = time.monotonic()
                while not heir.is_leader:
                    assert time.monotonic() - cut_at < 2 * TTL_S
                    await asyncio.sleep(0.005)
                    assert not (lost.is_leader and heir.is_leader)
                wire.mend()
                await until(lambda: lost.leader == b"near")
                assert not lost.is_leader
        await far.close()
