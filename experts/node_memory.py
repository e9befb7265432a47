"""How much memory this machine, or the container that this process runs in, has and has free.

The smaller of the machine's memory and the limits of the control groups (version 1 and 2) that this process belongs
to. Reads `/proc` and `/sys/fs/cgroup`; where neither tells, the machine's numbers stand. Page cache of a group
counts as free: the kernel drops it before it refuses memory. Called by `cluster.memory_plan`'s callers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
SELF_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class NodeMemory:
    """Bytes. `total_bytes` is the limit that binds."""

    total_bytes: int
    available_bytes: int


def read_node_memory(self_cgroup: Path = SELF_CGROUP, cgroup_root: Path = CGROUP_ROOT) -> NodeMemory:
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for folder, files in _groups(self_cgroup, cgroup_root):
        limit = _read_number(folder / files.limit)
        used = _read_number(folder / files.used)
        if limit is None or used is None:
            continue
        free = limit - used + _page_cache(folder / "memory.stat", files.cache_prefix)
        total, available = min(total, limit), min(available, max(0, free))
    return NodeMemory(total, available)


@dataclass(frozen=True)
class _Files:
    limit: str
    used: str
    cache_prefix: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = _Files("memory.max", "memory.current", "")


def _groups(self_cgroup: Path, root: Path) -> Iterator[tuple[Path, _Files]]:
    """Every memory group of this process with those around it: each one's limit binds. Inside a container the path
    may be the host's and absent here; the group that is mounted as root is among them in any case."""
    try:
        lines = self_cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            mount, files = root / "memory", _VERSION_1
        elif not controllers:
            mount, files = root, _VERSION_2
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts:
            inside = PurePosixPath()
        for group in (inside, *inside.parents):
            yield mount / group, files


def _read_number(path: Path) -> int | None:
    """None where there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def _page_cache(path: Path, prefix: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(values[name]) for name in names if values.get(name, "").isdigit())
