"""What is done to a cluster under load, and what it has to do about it in time.

Each fault leaves the cluster whole again, except that a process it has started may still be
loading: `ChaosCluster.until_whole` waits for that.
"""

from __future__ import annotations

import asyncio
import random
import signal
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress

import aiohttp

from tests.chaos.cluster import LEASE_TTL_S, ChaosCluster, EtcdMember, Master, Worker, until
from tests.metrics_page import metric
from xllm.coordination import EtcdClient, Keys
from xllm.protocol import MasterId, WorkerId
from xllm.roles.leader_word import decode_word

NOTICE_S = 5.0
"""Until a master knows what its streams or etcd have to say, on a busy machine."""

KEYS = Keys("default")


class Faults:
    """Every fault by its name. `rng` picks the victims."""

    def __init__(self, cluster: ChaosCluster, rng: random.Random, etcd_pause_s: float) -> None:
        self._cluster = cluster
        self._rng = rng
        self._etcd_pause_s = etcd_pause_s
        """How long etcd is away."""
        self.spared: set[str] = set()
        """Names of roles that are not to be ended, so that their memory can be compared."""

    def named(self, name: str) -> Callable[[], Awaitable[None]]:
        fault: Callable[[], Awaitable[None]] = getattr(self, name)
        return fault

    # Workers

    async def kill_worker(self) -> None:
        worker = self._mortal_worker()
        await self._until_busy(worker)
        worker.kill()
        await self._until_state("ready", len(self._cluster.workers) - 1)
        worker.launch()

    async def freeze_worker(self) -> None:
        """Until its lease is gone and its requests have moved; then it is thawed."""
        worker = self._any_worker()
        await self._until_busy(worker)
        worker.send(signal.SIGSTOP)
        try:
            await self._until_state("ready", len(self._cluster.workers) - 1)
            await asyncio.sleep(LEASE_TTL_S + 2)
        finally:
            worker.send(signal.SIGCONT)

    async def stop_worker(self) -> None:
        worker = self._mortal_worker()
        worker.send(signal.SIGTERM)
        await self._until_ended(worker)
        worker.launch()

    async def drain_worker(self) -> None:
        worker = self._mortal_worker()
        request = urllib.request.Request(
            f"{worker.operator_url}/admin/drain?timeout=1", method="POST"
        )
        with await asyncio.to_thread(urllib.request.urlopen, request) as response:
            assert response.status == 202
        await self._until_ended(worker)
        worker.launch()

    async def lose_lease(self) -> None:
        """Revoked by hand, as after a pause or a jump of the clock."""
        worker = self._any_worker()
        before = _num_leases(worker)
        client = EtcdClient(self._cluster.etcd_addresses)
        key = KEYS.worker(WorkerId(worker.worker_id))
        try:
            async with asyncio.timeout(LEASE_TTL_S + NOTICE_S):  # an etcd that was wiped, say
                while (registered := await client.get(key)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await client.revoke(registered.lease, timeout_s=5)
        finally:
            await client.close()
        await self._until_new_lease(worker, before)

    async def split(self) -> None:
        """One master and one worker do not hear each other; everybody else does."""
        master = self._cluster.masters[0]
        worker = self._cluster.workers[-1]
        assert worker.proxy is not None
        before = metric(master.operator_url, "xllm_worker_streams_lost_total") or 0
        worker.proxy.cut(master.master_id)
        try:
            await until(
                lambda: (
                    (metric(master.operator_url, "xllm_worker_streams_lost_total") or 0) > before
                ),
                "the master notices",
                NOTICE_S,
            )
            connecting = metric(master.operator_url, 'xllm_workers{state="connecting"}')
            assert connecting == 1, "it knows the worker, but does not reach it"
            assert f"worker_lost worker_id={worker.worker_id}" in master.log
            await until(
                lambda: (
                    f"master_id={master.master_id} num_cancelled=" in worker.log
                    and "reason='silent for" in worker.log
                ),
                "the worker gives up the half-open connection",
                NOTICE_S,
            )
            for other in self._cluster.masters[1:]:
                ready = metric(other.operator_url, 'xllm_workers{state="ready"}')
                assert ready == len(self._cluster.workers)
        finally:
            worker.proxy.mend(master.master_id)

    # Masters

    async def kill_master(self) -> None:
        """Its workers drop what it asked for; another one leads in time."""
        master = self._cluster.masters[-1]
        master.kill()
        await asyncio.sleep(2.0)
        for worker in self._cluster.workers:
            connected, disconnected = (
                worker.log.count(f"master_{event} master_id={master.master_id}")
                for event in ("connected", "disconnected")
            )
            assert connected == disconnected, f"{worker.name} works for a master that is dead"
        client = EtcdClient(self._cluster.etcd_addresses)
        try:
            async with asyncio.timeout(2 * LEASE_TTL_S):
                while True:
                    leader = await client.get(KEYS.leader)
                    word = None if leader is None else decode_word(leader.value)
                    if word is not None and word.master_id != master.master_id:
                        break
                    await asyncio.sleep(0.1)
        finally:
            await client.close()
        master.launch()

    async def freeze_master(self) -> None:
        """Its workers give it up; thawed, it sends what it ran to them again."""
        master = self._cluster.masters[-1]
        before = _num_leases(master)
        master.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(LEASE_TTL_S + 2)
        finally:
            master.send(signal.SIGCONT)
        await self._until_new_lease(master, before)

    # etcd

    async def freeze_etcd_member(self) -> None:
        await self._until_registered()
        member = self._rng.choice(self._cluster.etcd)
        member.send(signal.SIGSTOP)
        try:
            await self._stays_whole(LEASE_TTL_S + 3)
        finally:
            member.send(signal.SIGCONT)

    async def kill_etcd_member(self) -> None:
        await self._until_registered()
        member = self._rng.choice(self._cluster.etcd)
        member.kill()
        try:
            await self._stays_whole(LEASE_TTL_S + 3)
        finally:
            member.launch()
            await member.until_healthy()

    async def restart_etcd(self) -> None:
        """All members at once; they come back with what they knew."""
        await self._etcd_away(lambda member: None)

    async def wipe_etcd(self) -> None:
        """All members at once; they come back empty."""
        await self._etcd_away(EtcdMember.wipe)

    async def _etcd_away(self, meanwhile: Callable[[EtcdMember], None]) -> None:
        members = self._cluster.etcd
        for member in members:
            member.kill()
            meanwhile(member)
        await asyncio.sleep(self._etcd_pause_s)
        for master in self._cluster.masters:
            usable = sum(
                metric(master.operator_url, f'xllm_workers{{state="{state}"}}') or 0
                for state in ("ready", "suspect")
            )
            assert usable == len(self._cluster.workers), "everyone goes on with the last view"
        for member in members:
            member.launch()
        for member in members:
            await member.until_healthy()

    # Clients

    async def lose_clients(self) -> None:
        """Some go away amid their answers, and one never reads its own."""
        url = self._cluster.masters[0].http_url
        body = {
            "model": "chaos",
            "prompt": "on and on",
            "max_tokens": 400,
            "n": 4,
            "stream": True,
            "ignore_eos": True,
        }
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:

            async def leave_early() -> None:
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    await response.content.readany()
                    response.close()

            async def read_nothing() -> None:
                with suppress(TimeoutError):
                    async with (
                        asyncio.timeout(3),
                        session.post(f"{url}/v1/completions", json=body) as response,
                    ):
                        response.content._protocol.pause_reading()
                        await asyncio.sleep(10)

            await asyncio.gather(*(leave_early() for _ in range(6)), read_nothing())

    # What they have in common

    def _mortal_worker(self) -> Worker:
        return self._rng.choice([w for w in self._cluster.workers if w.name not in self.spared])

    def _any_worker(self) -> Worker:
        return self._rng.choice(self._cluster.workers)

    async def _until_busy(self, worker: Worker) -> None:
        """A fault that meets no request proves nothing."""
        await until(
            lambda: (metric(worker.operator_url, "xllm_num_requests_running") or 0) >= 2,
            f"{worker.name} runs requests",
            NOTICE_S,
        )

    async def _until_state(self, state: str, count: int) -> None:
        for master in self._living_masters():
            await until(
                lambda master=master: (
                    metric(master.operator_url, f'xllm_workers{{state="{state}"}}') == count
                ),
                f"{count} workers are {state} at {master.name}",
                NOTICE_S,
            )

    def _living_masters(self) -> list[Master]:
        return [master for master in self._cluster.masters if master.is_running]

    async def _until_ended(self, worker: Worker) -> None:
        await until(lambda: not worker.is_running, f"{worker.name} ends", within_s=6.0)
        assert worker.process is not None
        assert worker.process.popen.returncode == 0, worker.log

    async def _until_new_lease(self, role: Worker | Master, before: float) -> None:
        await until(
            lambda: _num_leases(role) > before,
            f"{role.name} has a new lease",
            within_s=LEASE_TTL_S + NOTICE_S,
        )

    async def _until_registered(self) -> None:
        """The fault before this one may have taken leases: a wiped etcd's, say."""
        client = EtcdClient(self._cluster.etcd_addresses)
        try:
            async with asyncio.timeout(LEASE_TTL_S + NOTICE_S):
                for key, role, launched_at in self._keys():
                    while (  # noqa: ASYNC110
                        role.is_running
                        and role.launched_at == launched_at  # else it was killed meanwhile
                        and not await self._is_registered(client, key, role)
                    ):
                        await asyncio.sleep(0.05)
        finally:
            await client.close()

    @staticmethod
    async def _is_registered(client: EtcdClient, key: str, role: Worker | Master) -> bool:
        connected = await asyncio.to_thread(metric, role.operator_url, "xllm_etcd_connected")
        return connected == 1 and await client.get(key) is not None

    def _keys(self) -> list[tuple[str, Worker | Master, float]]:
        """Under which each role is registered, and since when it runs."""
        roles: list[tuple[str, Worker | Master]] = [
            *((KEYS.worker(WorkerId(w.worker_id)), w) for w in self._cluster.workers),
            *((KEYS.master(MasterId(m.master_id)), m) for m in self._cluster.masters),
        ]
        return [(key, role, role.launched_at) for key, role in roles]

    async def _stays_whole(self, seconds: float) -> None:
        """Nobody may lose a lease, and no worker may be doubted for want of one."""
        roles = [*self._cluster.workers, *self._cluster.masters]
        before = {
            role.launched_at: metric(role.operator_url, "xllm_lease_epochs_total")
            for role in roles
            if role.is_running
        }
        await asyncio.sleep(seconds)
        for role in roles:
            leases = before.get(role.launched_at)
            if leases:
                now = metric(role.operator_url, "xllm_lease_epochs_total")
                assert now == leases, f"{role.name} lost its lease"


def _num_leases(role: Worker | Master) -> float:
    """It has had so far; none while it does not answer."""
    return metric(role.operator_url, "xllm_lease_epochs_total") or 0
