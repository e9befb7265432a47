"""The memory of machine and control groups, over made-up files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from experts.node_memory import read_node_memory

MIB = 1 << 20


def _write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def _membership(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "cgroup").write_text("\n".join(lines))
    return tmp_path / "cgroup"


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    memory = read_node_memory(tmp_path / "none", tmp_path)
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_version_2_limit_binds_and_page_cache_is_free(tmp_path: Path) -> None:
    stat = f"anon 1\ninactive_file {2 * MIB}\nactive_file {MIB}"
    _write(tmp_path / "a/b", memory_max=8 * MIB, memory_current=6 * MIB, memory_stat=stat)
    memory = read_node_memory(_membership(tmp_path, "0::/a/b"), tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (8 * MIB, 5 * MIB)


def test_version_1_limit_binds_with_totals_of_the_group_and_those_below(tmp_path: Path) -> None:
    folder = tmp_path / "memory/job"
    _write(folder, memory_limit_in_bytes=8 * MIB, memory_usage_in_bytes=6 * MIB)
    stat = f"inactive_file 0\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}"
    _write(folder, memory_stat=stat)
    memory = read_node_memory(_membership(tmp_path, "4:cpu,memory:/job", "0::/"), tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (8 * MIB, 4 * MIB)


def test_tightest_of_the_groups_around_binds(tmp_path: Path) -> None:
    _write(tmp_path / "a", memory_max=4 * MIB, memory_current=3 * MIB)
    _write(tmp_path / "a/b", memory_max=8 * MIB, memory_current=MIB)
    memory = read_node_memory(_membership(tmp_path, "0::/a/b"), tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (4 * MIB, MIB)


@pytest.mark.parametrize("path", ["/host/only/path", "/../../x"])
def test_in_a_container_whose_path_is_the_host_s_the_mounted_root_binds(tmp_path: Path, path: str) -> None:
    _write(tmp_path, memory_max=8 * MIB, memory_current=9 * MIB)
    memory = read_node_memory(_membership(tmp_path, f"0::{path}"), tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (8 * MIB, 0)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "-1", "½"])
def test_group_without_a_limit_changes_nothing(tmp_path: Path, limit: str) -> None:
    _write(tmp_path / "a", memory_max=limit, memory_current=MIB)
    memory = read_node_memory(_membership(tmp_path, "0::/a", "nonsense"), tmp_path)
    assert memory.total_bytes == psutil.virtual_memory().total
