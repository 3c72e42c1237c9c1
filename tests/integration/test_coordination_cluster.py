"""Three members, of which one is frozen: its connections stay open and nothing answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from etcd_server import EtcdServer, cluster

from xllm.coordination import EtcdClient, Session, watch_prefix

TTL_S = 3


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[EtcdServer]]:
    members = cluster(tmp_path, 3)
    try:
        for member in members:
            member.launch()
        for member in members:
            member.wait_ready()
        yield members
    finally:
        for member in members:
            member.kill()


@pytest.mark.parametrize("role", ["leader", "follower"])
async def test_a_frozen_member_is_left_behind(members: list[EtcdServer], role: str) -> None:
    frozen = await find_member(members, leader=role == "leader")
    others = [member for member in members if member is not frozen]
    client = EtcdClient([member.address for member in (frozen, *others)])
    session = Session(client, TTL_S)
    lived: list[bool] = []

    async def look() -> None:
        while True:
            lived.append(session.alive)
            await asyncio.sleep(0.02)

    async with aclosing(watch_prefix(client, "/t/")) as items:
        await anext(items)
        await session.register("/t/worker", b"", exclusive=True)
        epoch = session.epoch
        await anext(items)  # from here on, the watch hangs on the member to be frozen
        tasks = [asyncio.create_task(session.run()), asyncio.create_task(look())]
        await asyncio.sleep(0.05)
        frozen.freeze()
        frozen_at = time.monotonic()
        keys = [f"/t/{i}" for i in range(20)]
        for key in keys:
            assert await session.fenced_put(key, b"")
        seen: list[str] = []
        async with asyncio.timeout(10.0):
            while keys[-1] not in seen:
                item = await anext(items)
                assert isinstance(item, list)
                seen += [change.kv.key for change in item]
        # The put that met the freeze was tried twice, and may have been applied twice.
        assert list(dict.fromkeys(seen)) == keys
        await asyncio.sleep(frozen_at + 1.2 * TTL_S - time.monotonic())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert all(lived)
    assert session.epoch == epoch
    assert await client.time_to_live(epoch) > 0
    await session.close()
    await client.close()


async def find_member(members: list[EtcdServer], *, leader: bool) -> EtcdServer:
    for member in members:
        client = EtcdClient([member.address])
        status = await client.status()
        await client.close()
        if status.is_leader == leader:
            return member
    raise AssertionError("no member has that role")
