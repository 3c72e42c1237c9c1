"""Getting into etcd: TLS with certificates of both sides, a user and its rights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from etcd3aio import _protobuf as pb
from etcd_server import EtcdServer

from tests.certificates import write_certificates
from xllm.config import EtcdConfig, SecurityConfig
from xllm.coordination import EtcdClient, Keys, Session, Snapshot, watch_prefix
from xllm.coordination.access import PASSWORD_VARIABLE, EtcdAccess
from xllm.errors import ConfigError, EtcdUnavailable

PASSWORD = "a password of etcd"


@pytest.fixture
def certificates(tmp_path: Path) -> SecurityConfig:
    return write_certificates(tmp_path / "certificates")


@pytest.fixture
def tls_etcd(tmp_path: Path, certificates: SecurityConfig) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path / "etcd", tls=certificates)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def config_for(address: str, files: SecurityConfig, **changes: object) -> EtcdConfig:
    config = EtcdConfig(
        etcd_addr=address, etcd_ca=files.tls_ca, etcd_cert=files.tls_cert, etcd_key=files.tls_key
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def opened(config: EtcdConfig) -> AsyncIterator[EtcdClient]:
    client = EtcdClient.of(config)
    try:
        yield client
    finally:
        await client.close()


async def test_everything_works_over_tls(
    tls_etcd: EtcdServer, certificates: SecurityConfig
) -> None:
    for address in (tls_etcd.address, f"https://localhost:{tls_etcd.port}"):
        async with opened(config_for(address, certificates)) as client:
            await client.connect(5.0)
            session = Session(client, 5.0)
            await session.register("/xllm/x/masters/m", b"{}")
            assert await client.keep_alive(session.epoch, attempt_s=2.0, timeout_s=2.0) > 0
            async with aclosing(watch_prefix(client, "/xllm/x/")) as items:
                first = await anext(items)
                assert isinstance(first, Snapshot)
                await client.put("/xllm/x/masters/n", b"{}")
                [change] = await anext(items)  # type: ignore[misc]
                assert change.kv.key == "/xllm/x/masters/n"
            await session.close()


async def test_without_the_right_certificates_nobody_gets_in(
    tls_etcd: EtcdServer, certificates: SecurityConfig, tmp_path: Path
) -> None:
    theirs = write_certificates(tmp_path / "theirs", "theirs")
    for config in (
        EtcdConfig(etcd_addr=tls_etcd.address),
        EtcdConfig(etcd_addr=tls_etcd.address, etcd_ca=certificates.tls_ca),
        config_for(tls_etcd.address, certificates, etcd_ca=theirs.tls_ca),
        config_for(
            tls_etcd.address, certificates, etcd_cert=theirs.tls_cert, etcd_key=theirs.tls_key
        ),
    ):
        async with opened(config) as client:
            with pytest.raises(EtcdUnavailable):
                await client.ping(0.7)


async def set_up_user(etcd: EtcdServer) -> None:
    """`xllm` may do what it likes below /xllm/, and nothing else."""
    async with grpc.aio.insecure_channel(etcd.address) as channel:
        auth = pb.AuthStub(channel)
        await auth.RoleAdd(pb.AuthRoleAddRequest(name="root"))
        await auth.RoleAdd(pb.AuthRoleAddRequest(name="cluster"))
        request = pb.AuthRoleGrantPermissionRequest(name="cluster")
        request.perm.permType = request.perm.READWRITE
        request.perm.key, request.perm.range_end = b"/xllm/", b"/xllm0"
        await auth.RoleGrantPermission(request)
        for user, role in (("root", "root"), ("xllm", "cluster")):
            await auth.UserAdd(pb.AuthUserAddRequest(name=user, password=PASSWORD))
            await auth.UserGrantRole(pb.AuthUserGrantRoleRequest(user=user, role=role))
        await auth.AuthEnable(pb.AuthEnableRequest())


async def test_a_user_with_rights_to_its_folder(etcd: EtcdServer, tmp_path: Path) -> None:
    await set_up_user(etcd)
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    config = EtcdConfig(etcd_addr=etcd.address, etcd_user="xllm", etcd_password_file=str(password))
    async with opened(config) as client:
        await client.connect(5.0)
        keys = Keys("x")
        session = Session(client, 5.0)
        await session.register(keys.worker("w"), b"{}", exclusive=True)  # type: ignore[arg-type]
        assert await client.keep_alive(session.epoch, attempt_s=2.0, timeout_s=2.0) > 0
        async with aclosing(watch_prefix(client, keys.workers)) as items:
            await anext(items)
            # As after minutes without a call, on a member that was started again.
            client._access._token = "forgotten.1"
            assert await client.get(keys.worker("w")) is not None  # type: ignore[arg-type]
            await client.put(f"{keys.workers}v", b"{}")
            [change] = await anext(items)  # type: ignore[misc]
            assert change.kv.key == f"{keys.workers}v"
        client._access._token = "forgotten.2"
        async with aclosing(watch_prefix(client, keys.workers)) as items:
            assert isinstance(await anext(items), Snapshot)
        await session.close()
    for wrong in (
        EtcdConfig(etcd_addr=etcd.address),
        replace(config, etcd_user="nobody"),
    ):
        async with opened(wrong) as client:
            with pytest.raises(ConfigError, match="--etcd_user"):
                await client.connect(2.0)


def test_the_password_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EtcdConfig(etcd_addr="h:1", etcd_user="u")
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=PASSWORD_VARIABLE):
        EtcdAccess.of(config)
    monkeypatch.setenv(PASSWORD_VARIABLE, "from the environment")
    assert EtcdAccess.of(config)._password == "from the environment"
    (tmp_path / "p").write_text("from a file\n")
    both = replace(config, etcd_password_file=str(tmp_path / "p"))
    assert EtcdAccess.of(both)._password == "from a file"
    with pytest.raises(ConfigError, match="--etcd_ca=/nothing"):
        EtcdAccess.of(replace(config, etcd_ca="/nothing"))
