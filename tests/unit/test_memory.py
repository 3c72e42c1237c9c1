"""What is available in a control group, on a made-up file system."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from xllm.engine.memory import available_memory_bytes

MIB = 1 << 20


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_ancestor_decides_in_v2(membership: Path, tmp_path: Path) -> None:
    membership.write_text("0::/outer/inner\n")
    mount = tmp_path / "fs"
    write(mount / "outer/inner", memory__max="max", memory__current=10 * MIB)
    stat = f"anon 5\ninactive_file {8 * MIB}\nactive_file 7"
    write(mount / "outer", memory__max=100 * MIB, memory__current=50 * MIB, memory__stat=stat)
    assert available_memory_bytes(membership, mount) == 58 * MIB


def test_a_container_sees_its_own_group_as_the_root(membership: Path, tmp_path: Path) -> None:
    membership.write_text("0::/docker/abc\n")
    mount = tmp_path / "fs"
    write(mount, memory__max=64 * MIB, memory__current=4 * MIB)
    assert available_memory_bytes(membership, mount) == 60 * MIB


def test_v1(membership: Path, tmp_path: Path) -> None:
    membership.write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    mount = tmp_path / "fs"
    write(
        mount / "memory/job",
        memory__limit_in_bytes=32 * MIB,
        memory__usage_in_bytes=30 * MIB,
        memory__stat=f"total_inactive_file {MIB}",
    )
    write(mount / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=MIB)
    assert available_memory_bytes(membership, mount) == 3 * MIB


def test_a_group_over_its_limit_has_nothing_left(membership: Path, tmp_path: Path) -> None:
    membership.write_text("0::/\n")
    write(tmp_path / "fs", memory__max=MIB, memory__current=2 * MIB)
    assert available_memory_bytes(membership, tmp_path / "fs") == 0


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    available = available_memory_bytes(tmp_path / "none", tmp_path / "none")
    assert 0 < available <= psutil.virtual_memory().total
