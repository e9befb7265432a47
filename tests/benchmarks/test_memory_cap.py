"""The group that a limit is set on, and what happens where none can be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory_cap import V1, V2, memory_cap, own_group

ALLOCATE = "import sys; b = bytearray(int(sys.argv[1])); print(len(b))"


def _v1(root: Path) -> Path:
    folder = root / "memory" / "jobs" / "a"
    folder.mkdir(parents=True)
    (folder / V1.limit).write_text("9223372036854771712")
    return folder


def test_hierarchy_that_is_not_mounted_is_no_group(tmp_path: Path) -> None:
    assert own_group(["4:memory:/jobs/a", "0::/"], tmp_path) is None


def test_version_1_group_is_that_of_the_memory_controller(tmp_path: Path) -> None:
    folder = _v1(tmp_path)
    assert own_group(["8:pids:/x", "4:cpu,memory:/jobs/a", "0::/"], tmp_path) == (folder, V1)


def test_version_2_group_needs_the_memory_controller(tmp_path: Path) -> None:
    folder = tmp_path / "user.slice"
    folder.mkdir()
    (folder / "cgroup.controllers").write_text("cpu pids\n")
    assert own_group(["0::/user.slice"], tmp_path) is None
    (folder / "cgroup.controllers").write_text("cpu memory pids\n")
    assert own_group(["0::/user.slice"], tmp_path) == (folder, V2)


def test_without_a_hierarchy_the_reason_is_told_and_children_still_run(tmp_path: Path) -> None:
    with memory_cap(1 << 20, "test", root=tmp_path) as cap:
        assert not cap.is_enforced
        assert cap.reason
        cap.enter()
        assert cap.peak_bytes() is None


def test_limit_holds_for_a_child_and_the_group_is_removed() -> None:
    with memory_cap(64 << 20, "test-cap") as cap:
        if not cap.is_enforced:
            pytest.skip(f"no memory group can be made here: {cap.reason}")
        fits, too_large = (
            subprocess.run(
                [sys.executable, "-c", ALLOCATE, str(nbytes)],
                preexec_fn=cap.enter,
                capture_output=True,
                timeout=60,
                check=False,
            )
            for nbytes in (16 << 20, 256 << 20)
        )
        assert fits.returncode == 0
        assert too_large.returncode != 0
        peak = cap.peak_bytes()
        assert peak is None or peak <= 64 << 20
        folder = cap.folder
    assert folder is not None and not folder.exists()
