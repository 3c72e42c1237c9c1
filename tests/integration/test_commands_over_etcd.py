"""Commands over a real etcd: executed once, by the run of a worker that is meant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from counting_engine import make_info
from etcd_server import EtcdServer, Wire, until

from xllm.coordination import EtcdClient, Keys, Session
from xllm.errors import InvalidRequest
from xllm.protocol import Command, CommandKind, CommandState, Epoch, MasterId, WorkerId, WorkerInfo
from xllm.roles.command_desk import CommandDesk
from xllm.roles.command_runner import CommandRunner
from xllm.roles.commands import Done, encode_command

KEYS = Keys("test")
A, B = WorkerId("127.0.0.1:1"), WorkerId("127.0.0.1:2")
MASTER = MasterId("m")


class Worker:
    """One that notes what it was told to do."""

    def __init__(self, client: EtcdClient, worker_id: WorkerId, ttl_s: float = 2) -> None:
        self.worker_id = worker_id
        self.session = Session(client, ttl_s)
        self.executed: list[Command] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.after: list[str] = []
        self.runner = CommandRunner(self.session, KEYS, worker_id, self._execute)

    @property
    def info(self) -> WorkerInfo:
        return make_info(self.worker_id, epoch=self.session.epoch)

    async def _execute(self, command: Command) -> Done:
        self.executed.append(command)
        await self.may_end.wait()
        if command.tier == "attic":
            raise InvalidRequest("there is no attic")
        return Done({"said": command.kind.value}, lambda: self.after.append(command.command_id))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Worker]:
        tasks = [asyncio.create_task(self.session.run())]
        try:
            await self.session.register(KEYS.worker(self.worker_id), b"{}", exclusive=True)
            tasks.append(asyncio.create_task(self.runner.run()))
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def desk(client: EtcdClient) -> CommandDesk:
    return CommandDesk(client, KEYS, MASTER)


async def test_each_worker_answers_and_nothing_is_left(
    client: EtcdClient, desk: CommandDesk
) -> None:
    async with Worker(client, A).running() as a, Worker(client, B).running() as b:
        started = time.monotonic()
        answers = await desk.ask([a.info, b.info], CommandKind.CLEAR, 5.0, {"tier": "host"})
        assert time.monotonic() - started < 2.0
        assert [answers[w].state for w in (A, B)] == [CommandState.DONE] * 2
        assert answers[A].outcome == {"said": "clear"}
        assert [command.tier for command in a.executed] == ["host"]
        assert len(a.after) == len(b.after) == 1
        assert await client.is_empty(KEYS.commands)
        refused = await desk.ask([a.info], CommandKind.CLEAR, 5.0, {"tier": "attic"})
        assert (refused[A].state, refused[A].error) == (CommandState.FAILED, "there is no attic")


async def test_a_worker_that_is_slow_is_not_waited_for_and_does_it_all_the_same(
    client: EtcdClient, desk: CommandDesk
) -> None:
    async with Worker(client, A).running() as a, Worker(client, B).running() as b:
        b.may_end.clear()
        answers = await desk.ask([a.info, b.info], CommandKind.CLEAR, 0.5)
        assert answers[A].state is CommandState.DONE
        assert answers[B].state is CommandState.RUNNING
        b.may_end.set()
        await until(lambda: bool(b.after))
        [left] = (await client.range(KEYS.commands)).kvs
        assert KEYS.worker_of_command(left.key) == B
        assert await client.time_to_live(left.lease) > 500


async def test_a_later_run_of_a_worker_does_nothing_that_was_meant_for_the_earlier(
    client: EtcdClient,
) -> None:
    lease = 4242
    await client.grant(lease, 60)

    def left_over(command_id: str, state: CommandState) -> Command:
        return Command(
            command_id=command_id,
            worker_id=A,
            epoch=Epoch(99),
            kind=CommandKind.DRAIN,
            master_id=MASTER,
            created_at=time.time(),
            state=state,
        )

    for command in (left_over("p", CommandState.PENDING), left_over("r", CommandState.RUNNING)):
        await client.put(KEYS.command(A, command.command_id), encode_command(command), lease)
    async with Worker(client, A).running() as a:

        async def are_refused() -> bool:
            values = [kv.value for kv in (await client.range(KEYS.commands)).kvs]
            return all(b"failed" in value for value in values)

        await until(are_refused)
        values = [kv.value for kv in (await client.range(KEYS.commands)).kvs]
        assert b"earlier run" in values[0]
        assert b"has ended while it ran" in values[1]
        assert a.executed == []


async def test_a_new_lease_is_not_a_new_run(
    etcd: EtcdServer, client: EtcdClient, desk: CommandDesk
) -> None:
    async with Worker(client, A).running() as a:
        before = a.info
        await client.revoke(a.session.epoch)
        await until(lambda: a.session.epoch != before.epoch)
        answers = await desk.ask([before], CommandKind.CLEAR, 10.0)
        assert answers[A].state is CommandState.DONE


async def test_an_etcd_that_comes_back_empty_has_dropped_the_command(
    etcd: EtcdServer, client: EtcdClient, desk: CommandDesk
) -> None:
    async with Worker(client, A).running() as a:
        a.may_end.clear()
        asking = asyncio.create_task(desk.ask([a.info], CommandKind.CLEAR, 20.0))
        await until(lambda: bool(a.executed))
        etcd.wipe()
        etcd.start()
        answers = await asking
        assert answers[A].state is CommandState.FAILED
        assert "dropped" in answers[A].error
        a.may_end.set()


async def test_a_shaky_connection_executes_nothing_twice(
    etcd: EtcdServer, client: EtcdClient, desk: CommandDesk
) -> None:
    async with Wire(etcd.port) as wire:
        shaky = EtcdClient([wire.address], timeout_s=1.0)
        await shaky.connect(5.0)
        try:
            async with Worker(shaky, A, ttl_s=60).running() as a:
                # Claims and outcomes are applied, and their answers lost.
                answers = []
                while wire.cuts < 8:
                    asking = asyncio.gather(
                        *(desk.ask([a.info], CommandKind.UNPIN, 20.0) for _ in range(10))
                    )
                    await asyncio.sleep(0.005 * wire.cuts)
                    wire.cut()
                    wire.mend()
                    answers += [answer[A] for answer in await asking]
                assert {answer.state for answer in answers} == {CommandState.DONE}
                ids = [command.command_id for command in a.executed]
                assert sorted(ids) == sorted({answer.command_id for answer in answers})
        finally:
            await shaky.close()
