"""How much memory a process may still take: the machine's, and its control groups'.

In a container the machine's figure is an invitation to be killed: every group from the process's
own up to the root may have a limit, in cgroup v2 (memory.max) or v1 (memory.limit_in_bytes). The
page cache that a group could give back does not count as used.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """The least of what the machine and each control group of this process have left."""
    available = int(psutil.virtual_memory().available)
    for folder, (limit_file, usage_file, reclaimable_key) in _group_folders(membership, mount):
        limit = _read_int(folder / limit_file)
        usage = _read_int(folder / usage_file)
        if limit is None or usage is None:
            continue
        reclaimable = _read_stat(folder / "memory.stat", reclaimable_key)
        available = min(available, max(0, limit - usage + reclaimable))
    return available


def _group_folders(membership: Path, mount: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """This process's groups and their ancestors, with the names of their files.

    In a container with a namespace of its own the path may not exist below the mount; its root is
    then the container's group, which is always among the ancestors.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders: list[tuple[Path, tuple[str, str, str]]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = mount, _V2
        elif "memory" in controllers.split(","):
            root, files = mount / "memory", _V1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        folders.extend((root / part, files) for part in (group, *group.parents))
    return folders


def _read_int(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0
