"""A hard memory limit around a child process, page cache included, by a memory cgroup made for it.

The group is made below this process's own, so no limit that already holds is left. Version 2 (`memory.max`) and
version 1 (`memory.limit_in_bytes`) are supported; where neither can be made, children run without a limit and
`reason` says why: results must then say so. Swap is closed where the kernel lets us.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
REMOVAL_DEADLINE_S = 10.0


@dataclass(frozen=True)
class CapFiles:
    """Names of the controls in one version."""

    version: int
    limit: str
    swap: tuple[str, str]
    """Control and the value that closes it; `{}` stands for the limit."""
    peak: str
    events: str


V1 = CapFiles(
    1,
    "memory.limit_in_bytes",
    ("memory.memsw.limit_in_bytes", "{}"),
    "memory.max_usage_in_bytes",
    "memory.failcnt",
)
V2 = CapFiles(2, "memory.max", ("memory.swap.max", "0"), "memory.peak", "memory.events")


@dataclass(frozen=True)
class MemoryCap:
    """One group. `folder` is None where no group could be made."""

    folder: Path | None
    files: CapFiles | None
    reason: str | None
    """Why there is no limit; None where there is one."""

    @property
    def is_enforced(self) -> bool:
        return self.folder is not None

    def enter(self) -> None:
        """Put the calling process into the group: for `preexec_fn` of a child."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        """Most memory that the group ever held, page cache included; None where the kernel does not tell."""
        if self.folder is None or self.files is None:
            return None
        try:
            return int((self.folder / self.files.peak).read_text())
        except (OSError, ValueError):
            return None


@contextmanager
def memory_cap(limit_bytes: int, name: str, root: Path = CGROUP_ROOT) -> Iterator[MemoryCap]:
    """A group with this limit, removed at the end. All its processes must have ended by then."""
    cap = _make(limit_bytes, name, _own_groups(), root)
    try:
        yield cap
    finally:
        if cap.folder is not None:
            _remove(cap.folder)


def own_group(lines: Sequence[str], root: Path) -> tuple[Path, CapFiles] | None:
    """The folder of this process's memory group, from the lines of /proc/self/cgroup; version 1 wins where both are.

    None where no hierarchy with a memory controller is mounted below `root`.
    """
    unified: str | None = None
    for line in lines:
        number, controllers, path = line.rstrip("\n").split(":", 2)
        if "memory" in controllers.split(","):
            folder = root / "memory" / path.lstrip("/")
            return (folder, V1) if (folder / V1.limit).exists() else None
        if number == "0":
            unified = path
    if unified is not None:
        folder = root / unified.lstrip("/")
        with suppress(OSError):
            if "memory" in (folder / "cgroup.controllers").read_text().split():
                return folder, V2
    return None


def _own_groups() -> list[str]:
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []


def _make(limit_bytes: int, name: str, lines: Sequence[str], root: Path) -> MemoryCap:
    own = own_group(lines, root)
    if own is None:
        return MemoryCap(None, None, "no memory controller is mounted")
    parent, files = own
    folder = parent / f"{name}-{os.getpid()}"
    try:
        if files is V2:
            _delegate(parent)
        folder.mkdir()
    except OSError as error:
        return MemoryCap(None, None, f"no group can be made below {parent}: {error.strerror}")
    try:
        (folder / files.limit).write_text(str(limit_bytes))
    except OSError as error:
        _remove(folder)
        return MemoryCap(None, None, f"{files.limit} cannot be set: {error.strerror}")
    with suppress(OSError):  # there may be no swap accounting
        (folder / files.swap[0]).write_text(files.swap[1].format(limit_bytes))
    return MemoryCap(folder, files, None)


def _delegate(parent: Path) -> None:
    """Version 2 hands a controller to children only where it is named; refused where the parent holds processes."""
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _remove(folder: Path) -> None:
    """A group stays busy for a moment after its last process."""
    deadline = time.monotonic() + REMOVAL_DEADLINE_S
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
