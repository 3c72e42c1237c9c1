"""A real pool on Mooncake Store: its master, and a process that lends it memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from xllm.cache.store_process import StoreAddress

START_TIMEOUT_S = 30.0


def why_not() -> str | None:
    """Why there is no pool to be had on this machine; None: there is."""
    code = "import mooncake.store"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode == 0:
        return None
    last = found.stderr.strip().splitlines()[-1]
    return f"no Mooncake Store here ({last}): pip install '.[mooncake]', apt install libibverbs1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MooncakePool:
    """`start` and `close`; in between, each process can be frozen, killed and started again."""

    def __init__(
        self,
        folder: Path,
        num_bytes: int = 256 << 20,
        *master_flags: str,
        metadata_server: str = "P2PHANDSHAKE",
    ) -> None:
        """`num_bytes`: that each process of memory has at most."""
        self._folder = folder
        self._num_bytes = num_bytes
        self._master_flags = master_flags
        self._metadata_server = metadata_server
        self._port = _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """Of the master."""
        return f"127.0.0.1:{self._port}"

    @property
    def store(self) -> StoreAddress:
        """What a worker of this machine is told that lends the pool nothing."""
        return StoreAddress(
            protocol="tcp",
            master_server_address=self.address,
            metadata_server=self._metadata_server,
            local_hostname="127.0.0.1",
            segment_size=0,
            replica_num=1,
        )

    def start(self) -> None:
        """Raises: TimeoutError."""
        self.start_master()
        self.start_memory()

    def start_master(self) -> None:
        self._launch(
            "master",
            *("mooncake_master", f"-rpc_port={self._port}", f"-metrics_port={_free_port()}"),
            *("-metrics_host=127.0.0.1", *self._master_flags),
        )
        self._wait_port("master", self._port)

    def start_memory(self, name: str = "memory") -> None:
        port = _free_port()
        self._launch(
            name,
            *("mooncake_client", f"-master_server_address={self.address}", "-host=127.0.0.1"),
            *(f"-metadata_server={self._metadata_server}", "-protocol=tcp", f"-port={port}"),
            f"-global_segment_size={self._num_bytes} B",
        )
        self._wait_port(name, port)

    def freeze(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def thread_ids(self, name: str) -> list[int]:
        tasks = Path(f"/proc/{self._processes[name].pid}/task")
        return [int(task.name) for task in tasks.iterdir()]

    def close(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    def _launch(self, name: str, program: str, *flags: str) -> None:
        binary = Path(sys.executable).parent / program
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(binary), *flags],
                stdout=log,
                stderr=log,
                env=dict(os.environ) | {"GLOG_minloglevel": "1"},
            )

    def _wait_port(self, name: str, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            status = self._processes[name].poll()
            if status is not None:
                log = (self._folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} ended with status {status}: {log[-1000:]}")
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                return
            except OSError:
                time.sleep(0.02)
        raise TimeoutError(f"{name} does not listen on port {port}")
