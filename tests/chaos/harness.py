"""Load and faults together, and what has to hold afterwards.

learn every answer ── load ──────────────────────────────────── stop ── check
                        fault, whole again, fault, whole again, ...
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.chaos.checks import EtcdDiverged, check_etcd, check_indexes
from tests.chaos.cluster import ChaosCluster, Master, Role, until
from tests.chaos.faults import Faults
from tests.chaos.load import Case, Client, Load, make_cases
from tests.chaos.model import write_chaos_model
from tests.e2e.processes import launcher
from tests.metrics_page import metric

NUM_CLIENTS = 6
NUM_CASES = 18
MAX_TOKENS = 120
WARM_UP_S = 5.0
IDLE_WITHIN_S = 20.0
"""Handing hot blocks over and fetching them goes on for a moment after the last answer."""
PEAK_REQUESTS = 24
"""Per worker: more than its batch holds."""
RSS_GROWTH = 1.05
RSS_SLACK_BYTES = 8 << 20
"""Of a process that is so small that 5 % of it is noise."""


class Chaos:
    """One run. `log` gets a line for everything that happens."""

    def __init__(self, cluster: ChaosCluster, seed: int, etcd_pause_s: float) -> None:
        self._cluster = cluster
        self._seed = seed
        self._rng = random.Random(seed)
        self._faults = Faults(cluster, self._rng, etcd_pause_s)
        self._started_at = time.monotonic()

    async def run(self, schedule: Iterable[str]) -> None:
        """Each entry is a fault, or several at once with `+` between them.

        Raises: AssertionError or TimeoutError for anything that users must not see; EtcdDiverged
        instead, if etcd has members that do not agree."""
        try:
            await self._run(schedule)
        except Exception as error:
            try:
                self._say(await check_etcd(self._cluster.etcd))
            except EtcdDiverged as diverged:
                raise diverged from error
            raise

    async def _run(self, schedule: Iterable[str]) -> None:
        timeout = aiohttp.ClientTimeout(total=120, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            client = Client(session)
            cases = make_cases(self._rng, NUM_CASES, MAX_TOKENS)
            known = await client.learn(self._cluster.masters[0].http_url, cases)
            assert len(known) > NUM_CASES / 2
            self._say(f"learned cases={len(known)}")
            await self._reach_peak(client, [case for case in cases if case.name in known])
            load = Load(client, cases, known, self._pick_master, self._seed)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(load.run(NUM_CLIENTS))
                await asyncio.gather(asyncio.sleep(WARM_UP_S), self._faults.lose_clients())
                survivors = self._choose_survivors()
                before = {role.name: role.rss_bytes for role in survivors}
                for name in schedule:
                    began = time.monotonic()
                    self._say(f"fault name={name}")
                    faults = (self._faults.named(part)() for part in name.split("+"))
                    await asyncio.gather(*faults)
                    await self._cluster.until_whole()
                    gap_s = max((g for at, g in client.gaps if at > began), default=0.0)
                    self._say(f"whole name={name} longest_gap_s={gap_s:.2f}")
                    self._say(f"load outcomes={dict(load.tally.outcomes)}")
                    if load.tally.wrong:
                        break
                load.stop()
            self._say(f"ended outcomes={dict(load.tally.outcomes)}")
        assert not load.tally.wrong, "\n".join(load.tally.wrong)
        assert load.tally.outcomes["streamed"]
        assert load.tally.outcomes["plain"]
        moved = metric(self._cluster.masters[0].operator_url, "xllm_requests_resubmitted_total")
        self._say(f"moved requests={moved}")
        assert moved, "no fault met a request that was running"
        await self._check_idle()
        self._say(await check_etcd(self._cluster.etcd))
        answered = [case for case in cases if case.name in known]
        self._say(await check_indexes(self._cluster, answered))
        self._check_memory(survivors, before)

    async def _reach_peak(self, client: Client, cases: Sequence[Case]) -> None:
        """Full batches of the most demanding requests: what memory a worker ever takes for them,
        its allocator keeps."""
        scored = [case for case in cases if case.body.get("echo")]
        for _ in range(2):
            masters = itertools.cycle(self._cluster.masters)
            crowd = PEAK_REQUESTS * len(self._cluster.workers)
            await asyncio.gather(
                *(
                    client.ask(next(masters).http_url, case, stream=False)
                    for case in itertools.islice(itertools.cycle(scored), crowd)
                )
            )

    def _choose_survivors(self) -> list[Role]:
        survivors: list[Role] = [self._cluster.workers[-1], self._cluster.masters[0]]
        self._faults.spared = {role.name for role in survivors}
        return survivors

    def _pick_master(self) -> tuple[str, object]:
        masters = [master for master in self._cluster.masters if self._is_ready(master)]
        master = self._rng.choice(masters or self._cluster.masters)
        asked_at = time.monotonic()
        return master.http_url, lambda: master.killed_at >= asked_at - 1.0

    def _is_ready(self, master: Master) -> bool:
        """A master that was started again gets requests when it has had time to find workers."""
        return master.is_running and time.monotonic() - master.launched_at > 15.0

    async def _check_idle(self) -> None:
        """Nothing runs, waits or is pinned anywhere."""
        for master in self._cluster.masters:
            await until(
                lambda master=master: (
                    metric(master.operator_url, "xllm_api_requests_in_flight") == 0
                ),
                f"{master.name} has nothing to do",
                within_s=IDLE_WITHIN_S,
            )
        for worker in self._cluster.workers:
            for name in (
                "xllm_num_requests_running",
                "xllm_num_requests_waiting",
                "xllm_kv_cache_usage_perc",
            ):
                await until(
                    lambda worker=worker, name=name: metric(worker.operator_url, name) == 0,
                    f"{name} of {worker.name} is 0",
                    within_s=IDLE_WITHIN_S,
                )

    def _check_memory(self, survivors: Iterable[Role], before: dict[str, int]) -> None:
        for role in survivors:
            limit = max(before[role.name] * RSS_GROWTH, before[role.name] + RSS_SLACK_BYTES)
            now = role.rss_bytes
            self._say(f"memory name={role.name} before_bytes={before[role.name]} now_bytes={now}")
            assert now <= limit, f"{role.name} grew from {before[role.name]} to {now} bytes"

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self._started_at:7.1f} {line}", flush=True)


@asynccontextmanager
async def chaos(
    folder: Path,
    *,
    num_members: int,
    num_workers: int,
    num_masters: int,
    seed: int,
    etcd_pause_s: float,
) -> AsyncIterator[Chaos]:
    """A cluster that is whole, and what to do to it."""
    model = await asyncio.to_thread(write_chaos_model, folder / "model")
    with launcher(folder) as started:
        cluster = ChaosCluster(started, model)
        try:
            await cluster.start(
                num_members=num_members, num_workers=num_workers, num_masters=num_masters
            )
            yield Chaos(cluster, seed, etcd_pause_s)
        finally:
            await cluster.stop()
