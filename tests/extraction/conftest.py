"""Checkpoints to be damaged, and disks that are really full or read-only."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extraction.manifest import ROLES
from extraction.plan import SHARD_INDEX
from tests.checkpoints import write_tiny_qwen3_moe


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in many shards, so that some expert's projections lie in different ones."""
    root = write_tiny_qwen3_moe(tmp_path_factory.mktemp("sharded") / "checkpoint", shard_size="20KB")
    weight_map = json.loads((root / SHARD_INDEX).read_text())["weight_map"]
    homes = {
        (layer, expert): {
            weight_map[f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"] for role in ROLES
        }
        for layer in range(2)
        for expert in range(8)
    }
    assert any(len(files) > 1 for files in homes.values()), "no expert straddles two shards"
    return root


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """The sharded checkpoint, to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own with the options given; again with `remount,...` to change them."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        return disk

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    try:
        yield mount
    finally:
        if disk.is_mount():
            subprocess.run(["umount", str(disk)], check=True, timeout=30)
