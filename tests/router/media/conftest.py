"""A tiny Qwen3-Omni, as a checkpoint and as a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from extraction.extract import extract
from router.loading import EngineOptions, LoadedEngine
from tests.checkpoints import write_tiny
from tests.engines import open_engine
from tests.router.media.thinkers import Published


@pytest.fixture(scope="session")
def omni_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3_omni_moe", tmp_path_factory.mktemp("omni") / "checkpoint", num_hidden_layers=3)


@pytest.fixture(scope="session")
def omni_store(omni_checkpoint: Path) -> Path:
    store = omni_checkpoint.parent / "store"
    extract(omni_checkpoint, store)
    return store


@pytest.fixture(scope="session")
def published(omni_checkpoint: Path) -> Published:
    return Published.load(omni_checkpoint)


@pytest.fixture(scope="session")
def omni(omni_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(omni_store, EngineOptions(dtype="float32"))
    yield loaded
    loaded.close()
