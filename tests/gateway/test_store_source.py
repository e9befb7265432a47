"""STORE as users type it: a store, a checkpoint, a bundled name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from extraction.errors import ExtractionError
from gateway.errors import StoreNotFound
from gateway.store_source import bundled_models, model_name, resolve_store


def test_store_is_itself(tiny_store: Path) -> None:
    assert resolve_store(str(tiny_store)) == tiny_store


def test_bundled_name_is_indexed_in_the_cache_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = resolve_store("stories")
    assert root.is_relative_to(tmp_path / "cache")
    written = (root / "manifest.json").stat().st_mtime_ns
    assert resolve_store("stories-moe") == root
    assert (root / "manifest.json").stat().st_mtime_ns == written
    assert set(bundled_models()) == {"stories", "stories-moe"}


def test_changed_checkpoint_is_indexed_anew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    first = resolve_store(str(checkpoint), cache_dir=tmp_path / "cache")
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert resolve_store(str(checkpoint), cache_dir=tmp_path / "cache") != first


def test_damaged_checkpoint_leaves_no_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExtractionError):
        resolve_store(str(checkpoint), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_unknown_name_lists_the_bundled_models(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="bundled models: stories, stories-moe"):
        resolve_store(str(tmp_path / "nothing"))


def test_folder_goes_by_its_own_name(tiny_store: Path) -> None:
    assert model_name(str(tiny_store)) == "store"
    assert model_name("stories") == "stories"
