"""Checkpoints to be damaged."""

from __future__ import annotations

import json
import shutil
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
