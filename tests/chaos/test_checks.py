"""That the checks after a run see what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.checks import EtcdDiverged, check_etcd
from tests.chaos.cluster import EtcdMember
from tests.e2e.processes import launcher
from xllm.coordination import EtcdClient


async def test_members_of_etcd_that_differ_are_blamed(tmp_path: Path) -> None:
    with launcher(tmp_path) as started:
        members = []
        for name in ("a", "b"):
            etcd = started.etcd()
            members.append(EtcdMember(name, [], started, "", process=etcd, address=etcd.address))
        for value in (b"same", b"same"):
            for member in members:
                await _put(member, value)
        assert "members=2" in await check_etcd(members)
        await _put(members[0], b"one")
        await _put(members[1], b"another")
        with pytest.raises(EtcdDiverged, match="differ at revision 4"):
            await check_etcd(members)
        members[1].kill()
        assert "members=1" in await check_etcd(members)
        members[0].kill()
        assert await check_etcd(members) == "etcd does not answer"


async def _put(member: EtcdMember, value: bytes) -> None:
    client = EtcdClient([member.address])
    try:
        await client.put("key", value)
    finally:
        await client.close()
