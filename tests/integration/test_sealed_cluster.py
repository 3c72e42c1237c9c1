"""A cluster whose etcd somebody else writes to: what is ignored, and what goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from counting_engine import make_info, until
from etcd_server import EtcdServer

from xllm.coordination import EtcdClient, Keys, Session
from xllm.protocol import Command, CommandKind, CommandState, WorkerId
from xllm.roles.cluster import Cluster
from xllm.roles.command_desk import CommandDesk
from xllm.roles.command_runner import CommandRunner
from xllm.roles.commands import Done
from xllm.roles.membership import check_peers
from xllm.security.seal import Seal
from xllm.security.secret import ClusterSecret
from xllm.telemetry import Metrics

KEYS = Keys("sealed")
SECRET = ClusterSecret("s" * 32)
W = WorkerId("w")


@asynccontextmanager
async def member(
    etcd: EtcdServer, secret: ClusterSecret | None = SECRET
) -> AsyncIterator[EtcdClient]:
    client = EtcdClient([etcd.address], seal=Seal(secret))
    await client.connect(5.0)
    try:
        yield client
    finally:
        await client.close()


async def test_a_forged_registration_is_ignored_and_named_once(
    etcd: EtcdServer, client: EtcdClient, caplog: pytest.LogCaptureFixture
) -> None:
    """`client` is the attacker's: it may write, and knows no secret."""
    async with member(etcd) as ours, member(etcd) as masters:
        session = Session(ours, 5.0)
        info = make_info("w", epoch=session.epoch, address="127.0.0.1:1")
        cluster = Cluster("m", Metrics())  # type: ignore[arg-type]
        following = asyncio.create_task(cluster.follow(masters, KEYS))
        await session.register(KEYS.worker(W), msgspec.json.encode(info), exclusive=True)
        await until(lambda: [m.info.worker_id for m in cluster.registry] == [W])
        recorded = await client.get(KEYS.worker(W))
        assert recorded is not None

        evil = make_info("evil", address="127.0.0.1:666", fingerprint="0" * 32)
        await client.put(KEYS.worker(WorkerId("evil")), msgspec.json.encode(evil))
        await client.put(KEYS.worker(WorkerId("copy")), recorded.value, recorded.lease)
        moved = msgspec.structs.replace(info, address="127.0.0.1:666")
        await client.put(KEYS.worker(W), msgspec.json.encode(moved), recorded.lease)
        await until(lambda: caplog.text.count("record_not_trusted") >= 3)
        assert [m.info.address for m in cluster.registry] == ["127.0.0.1:1"]
        names = [
            r.message.split(" reason")[0] for r in caplog.records if "not_trusted" in r.message
        ]
        assert len(names) == len(set(names)), "one line for each"
        # Nor does a worker of ours let itself be kept out by one that is none.
        await check_peers(ours, KEYS, make_info("v"))
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await session.close()


async def test_a_process_without_the_secret_is_not_seen_by_those_with_it(
    etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with member(etcd, None) as stranger, member(etcd) as ours:
        await stranger.put(KEYS.worker(W), msgspec.json.encode(make_info("w")))
        [kv] = (await ours.range(KEYS.workers)).kvs
        assert kv.value == b""
        assert "record_not_trusted" in caplog.text
        await ours.put(KEYS.worker(W), msgspec.json.encode(make_info("w")))
        [kv] = (await stranger.range(KEYS.workers)).kvs
        assert msgspec.json.decode(kv.value, type=type(make_info("w"))).worker_id == W


async def test_a_forged_command_is_not_executed_and_none_twice(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    executed: list[CommandKind] = []

    async def execute(command: Command) -> Done:
        executed.append(command.kind)
        return Done({"ok": True})

    async with member(etcd) as workers, member(etcd) as masters:
        session = Session(workers, 5.0)
        info = make_info("w", epoch=session.epoch)
        await session.register(KEYS.worker(W), msgspec.json.encode(info), exclusive=True)
        running = asyncio.create_task(CommandRunner(session, KEYS, W, execute).run())
        recorded: list[tuple[str, bytes]] = []

        async def record() -> None:
            """The attacker writes down what is in etcd."""
            while True:
                snapshot = await client.range(KEYS.commands)
                recorded.extend((kv.key, kv.value) for kv in snapshot.kvs)

        recording = asyncio.create_task(record())
        desk = CommandDesk(masters, KEYS, "m")  # type: ignore[arg-type]
        answers = await desk.ask([info], CommandKind.CLEAR, 5.0)
        assert answers[W].state is CommandState.DONE
        recording.cancel()
        await asyncio.gather(recording, return_exceptions=True)
        assert executed == [CommandKind.CLEAR]
        assert recorded

        for key, value in recorded:
            await client.put(key, value)
        plain = msgspec.json.encode(
            Command(
                command_id="evil",
                worker_id=W,
                epoch=session.epoch,
                kind=CommandKind.DRAIN,
                master_id="m",  # type: ignore[arg-type]
                created_at=0.0,
            )
        )
        await client.put(KEYS.command(W, "evil"), plain)
        # One more of ours, to know that the others have been seen.
        assert (await desk.ask([info], CommandKind.LOOKUP, 5.0))[W].state is CommandState.DONE
        assert executed == [CommandKind.CLEAR, CommandKind.LOOKUP]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await session.close()


async def test_a_command_that_was_put_back_with_its_own_lease_is_not_executed_again(
    etcd: EtcdServer, client: EtcdClient
) -> None:
    executed: list[str] = []

    async def execute(command: Command) -> Done:
        executed.append(command.command_id)
        return Done({})

    async with member(etcd) as workers, member(etcd) as masters:
        session = Session(workers, 5.0)
        info = make_info("w", epoch=session.epoch)
        await session.register(KEYS.worker(W), msgspec.json.encode(info), exclusive=True)
        command = Command(
            command_id="c",
            worker_id=W,
            epoch=session.epoch,
            kind=CommandKind.CLEAR,
            master_id="m",  # type: ignore[arg-type]
            created_at=time.time(),
        )
        key, lease_id = KEYS.command(W, "c"), 4711
        await masters.grant(lease_id, 60)
        await masters.put(key, msgspec.json.encode(command), lease_id)
        recorded = await client.get(key)
        assert recorded is not None
        running = asyncio.create_task(CommandRunner(session, KEYS, W, execute).run())
        await until(lambda: executed == ["c"])
        await client.revoke(lease_id)
        await client.grant(lease_id, 60)
        await client.put(key, recorded.value, lease_id)
        later = msgspec.structs.replace(command, command_id="d")
        await masters.put(KEYS.command(W, "d"), msgspec.json.encode(later), lease_id)
        await until(lambda: "d" in executed)
        assert executed == ["c", "d"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await session.close()
