"""What the leader does for the cluster, over a real etcd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from etcd_server import EtcdServer, until

from xllm.config import IndexConfig
from xllm.coordination import Compacted, Election, EtcdClient, EtcdNoSpace, Keys, Session
from xllm.coordination.embedded import NAME_PREFIX
from xllm.protocol import (
    Command,
    CommandKind,
    CommandState,
    Epoch,
    LeaderWord,
    MasterId,
    UploadShare,
    WorkerId,
)
from xllm.roles import leader as leader_module
from xllm.roles.commands import encode_command
from xllm.roles.etcd_size import EtcdSize, quota_among_metrics
from xllm.roles.leader import Leader
from xllm.roles.leader_word import decode_word, encode_word, follow_leader
from xllm.roles.upload_shares import Need
from xllm.telemetry import Metrics

KEYS = Keys("test")
A, B = WorkerId("a"), WorkerId("b")


class Master:
    def __init__(self, client: EtcdClient, name: str, config: IndexConfig | None = None) -> None:
        self.client = client
        self.session = Session(client, 2)
        master_id = MasterId(name)
        value = encode_word(LeaderWord(master_id=master_id))
        self.election = Election(self.session, KEYS.leader, value)
        self.needs: dict[WorkerId, Need] = {A: Need(10, 0), B: Need(10, 0)}
        self.now = 1000.0
        self.leader = Leader(
            self.election,
            client,
            KEYS,
            master_id,
            config or IndexConfig(),
            lambda: self.needs,
            lambda: self.now,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Master]:
        runs = (self.session.run, self.election.run, self.leader.run)
        tasks = [asyncio.create_task(run()) for run in runs]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results), results
            await self.session.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "PERIOD_S", 0.05)


async def test_workers_hear_their_shares_and_whoever_leads_next_decides_anew(
    client: EtcdClient,
) -> None:
    words: list[LeaderWord] = []
    listening = asyncio.create_task(follow_leader(client, KEYS, words.append))

    def share() -> UploadShare | None:
        return words[-1].share_of(A) if words else None

    async with Master(client, "m1").running() as first:
        await until(lambda: share() is not None)
        of_two = share()
        assert of_two is not None
        assert of_two.puts_per_s == pytest.approx(499, abs=1)
        del first.needs[B]
        await until(lambda: share() != of_two)
        of_one = share()
        assert of_one is not None
        assert of_one.puts_per_s == pytest.approx(999, abs=1)
        first.needs = {A: Need(10, 10**6), B: Need(10, 0)}
        await until(lambda: words[-1].wanting == [A])
        num_words = len(words)
        await asyncio.sleep(0.3)
        assert len(words) == num_words, "nothing has changed, so nothing is said"
    async with Master(client, "m2").running() as second:
        second.needs = {A: Need(10, 0)}
        await until(lambda: words[-1].master_id == "m2" and words[-1].share is not None)
        assert words[-1].share_of(A) == of_one
    listening.cancel()


async def test_only_the_leader_speaks(client: EtcdClient) -> None:
    async with Master(client, "m1").running() as first:
        await until(lambda: first.election.is_leader)
        async with Master(client, "m2").running() as second:
            second.needs = {}
            await asyncio.sleep(0.3)
            kv = await client.get(KEYS.leader)
            assert kv is not None
            word = decode_word(kv.value)
            assert word is not None
            assert word.master_id == "m1"
            assert not second.election.is_leader


async def history_is_there(client: EtcdClient, revision: int) -> bool:
    try:
        await client.get("/x", revision=revision)
    except Compacted:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "asked_for", "compacts"),
    [("m0", False, False), ("m0", True, True), (f"{NAME_PREFIX}0", False, True)],
)
async def test_history_of_an_own_etcd_is_forgotten_and_of_another_one_only_when_asked_for(
    tmp_path: Path, name: str, asked_for: bool, compacts: bool
) -> None:
    server = EtcdServer(tmp_path / "etcd", name=name)
    server.start()
    client = EtcdClient([server.address])
    try:
        await client.connect(5.0)
        config = IndexConfig(etcd_compact=asked_for)
        async with Master(client, "m1", config).running() as master:
            await until(lambda: master.election.is_leader)
            old = await client.put("/x", b"old")
            master.now += leader_module.TIDY_PERIOD_S
            await asyncio.sleep(0.15)
            new = await client.put("/x", b"new")
            assert await history_is_there(client, old - 1), "it is not old enough"
            master.now += leader_module.KEPT_HISTORY_S
            if compacts:

                async def is_forgotten() -> bool:
                    return not await history_is_there(client, old - 1)

                await until(is_forgotten)
            else:
                await asyncio.sleep(0.3)
                assert await history_is_there(client, old - 1)
            assert await history_is_there(client, new)
    finally:
        await client.close()
        server.kill()


async def fill(client: EtcdClient) -> None:
    for _ in range(100):
        await client.put("/x", bytes(200_000))


async def test_an_own_etcd_that_is_full_is_made_room_in(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd", "--quota-backend-bytes=4194304", name=f"{NAME_PREFIX}0")
    server.start()
    client = EtcdClient([server.address])
    try:
        await client.connect(5.0)
        async with Master(client, "m1").running() as master:
            await until(lambda: master.election.is_leader)
            with pytest.raises(EtcdNoSpace):
                await fill(client)
            master.now += leader_module.TIDY_PERIOD_S

            async def takes_puts() -> bool:
                try:
                    await client.put("/x", b"")
                except EtcdNoSpace:
                    return False
                return True

            await until(takes_puts, within_s=10)
    finally:
        await client.close()
        server.kill()


async def test_commands_that_nobody_will_execute_or_read_are_dropped(client: EtcdClient) -> None:
    def command(worker_id: WorkerId, command_id: str, state: CommandState, age_s: float) -> Command:
        return Command(
            command_id=command_id,
            worker_id=worker_id,
            epoch=Epoch(1),
            kind=CommandKind.CLEAR,
            master_id=MasterId("m"),
            created_at=0.0,
            state=state,
            ended_at=time.time() - age_s,
        )

    gone = WorkerId("gone")
    for given in (
        command(A, "pending", CommandState.PENDING, 0),
        command(A, "read-long-ago", CommandState.DONE, 3600),
        command(gone, "for-nobody", CommandState.PENDING, 0),
    ):
        await client.put(KEYS.command(given.worker_id, given.command_id), encode_command(given))

    async def left() -> list[str]:
        return [kv.key.rpartition("/")[2] for kv in (await client.range(KEYS.commands)).kvs]

    async with Master(client, "m1").running() as master:
        await until(lambda: master.election.is_leader)
        master.now += leader_module.TIDY_PERIOD_S
        await until(lambda: _is(left, ["for-nobody", "pending"]))
        for _ in range(3):
            master.now += leader_module.TIDY_PERIOD_S
            await asyncio.sleep(0.15)
        await until(lambda: _is(left, ["pending"]))


async def _is(left: object, expected: list[str]) -> bool:
    return sorted(await left()) == expected  # type: ignore[operator]


async def test_half_full_is_said_once_with_the_real_quota(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = EtcdServer(tmp_path / "etcd", "--quota-backend-bytes=4194304")
    server.start()
    client = EtcdClient([server.address])
    try:
        await client.connect(5.0)
        metrics = Metrics(engine=False)
        size = EtcdSize(client, metrics)
        assert await quota_among_metrics(client) == 4 << 20
        await size.look()
        assert size.quota_bytes == 4 << 20
        assert "etcd_filling_up" not in caplog.text
        for _ in range(12):
            await client.put("/x", bytes(200_000))
        await until(lambda: _is_half_full(size))
        await size.look()
        assert caplog.text.count("etcd_filling_up") == 1
        assert "xllm_etcd_quota_bytes 4.194304e+06" in metrics.render().decode()
    finally:
        await client.close()
        server.kill()


async def _is_half_full(size: EtcdSize) -> bool:
    await size.look()
    assert size.status is not None
    return size.status.db_size_bytes >= 2 << 20
