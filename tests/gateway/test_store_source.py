"""STORE as users type it: a store, a checkpoint, a bundled name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from experts.hash_log import LOG_NAME
from experts.store import ExpertStore
from extraction.errors import ExtractionError, ManifestInvalid
from extraction.expert_index import INDEX_NAME
from extraction.manifest import MANIFEST_NAME, read_manifest
from gateway.errors import StoreNotFound
from gateway.stores.source import bundled_models, model_name, resolve_runnable, resolve_store


def _refuse(line: str) -> None:
    raise AssertionError(f"nothing to say, but said: {line}")


def test_store_is_itself(tiny_store: Path) -> None:
    assert resolve_store(str(tiny_store), announce=_refuse) == tiny_store


def test_bundled_name_is_indexed_in_the_cache_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = resolve_store("stories", announce=_refuse)
    assert root.is_relative_to(tmp_path / "cache")
    written = (root / "manifest.json").stat().st_mtime_ns
    assert resolve_store("stories-moe", announce=_refuse) == root
    assert (root / "manifest.json").stat().st_mtime_ns == written
    assert set(bundled_models()) == {"stories", "stories-moe"}


def test_changed_checkpoint_is_indexed_anew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    first = resolve_store(str(checkpoint), announce=_refuse, cache_dir=tmp_path / "cache")
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert resolve_store(str(checkpoint), announce=_refuse, cache_dir=tmp_path / "cache") != first


def test_damaged_checkpoint_leaves_no_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExtractionError):
        resolve_store(str(checkpoint), announce=_refuse, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_unknown_name_lists_the_bundled_models(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="bundled models: stories, stories-moe"):
        resolve_store(str(tmp_path / "nothing"), announce=_refuse)


def test_folder_goes_by_its_own_name(tiny_store: Path) -> None:
    assert model_name(str(tiny_store)) == "store"
    assert model_name("stories") == "stories"


def _changed_manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(index: Path) -> None:
        table = json.loads((index / MANIFEST_NAME).read_text())
        change(table)
        (index / MANIFEST_NAME).write_text(json.dumps(table))

    return damage


def _cut(name: str) -> Callable[[Path], None]:
    def damage(index: Path) -> None:
        content = (index / name).read_bytes()
        (index / name).write_bytes(content[: len(content) // 2])

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "field of a later version": _changed_manifest(lambda table: table.update(shared_experts=[])),
    "field that an older version did not have": _changed_manifest(lambda table: table.pop("left_out")),
    "another format": _changed_manifest(lambda table: table.update(format_version=0)),
    "another checkpoint's": _changed_manifest(lambda table: table.update(source_root="/elsewhere")),
    "manifest cut short": _cut(MANIFEST_NAME),
    "index cut short": _cut(INDEX_NAME),
    "manifest gone": lambda index: (index / MANIFEST_NAME).unlink(),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_unusable_index_in_the_cache_is_made_anew_with_one_line(
    damage: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    root = resolve_store(str(tiny_checkpoint), announce=_refuse, cache_dir=cache)
    DAMAGES[damage](root)
    lines: list[str] = []
    assert resolve_store(str(tiny_checkpoint), announce=lines.append, cache_dir=cache) == root
    (line,) = lines
    assert "is made anew" in line and "\n" not in line
    assert read_manifest(root).source_root == str(tiny_checkpoint)
    assert [path.name for path in root.parent.iterdir()] == [root.name], "the old one was left behind"
    resolve_store(str(tiny_checkpoint), announce=_refuse, cache_dir=cache)


def test_hashes_of_the_first_load_outlive_the_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = resolve_store(str(tiny_checkpoint), announce=_refuse, cache_dir=tmp_path / "cache")
    store = ExpertStore.open(root)
    store.read_expert(store.expert_keys()[0])
    store.close()
    recorded = (root / LOG_NAME).read_text()
    _cut(INDEX_NAME)(root)
    resolve_store(str(tiny_checkpoint), announce=print, cache_dir=tmp_path / "cache")
    assert recorded and (root / LOG_NAME).read_text() == recorded


def test_unusable_store_that_the_user_named_is_refused_and_stays(tiny_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    DAMAGES["field of a later version"](store)
    before = (store / MANIFEST_NAME).read_bytes()
    with pytest.raises(ManifestInvalid, match="shared_experts"):
        resolve_runnable(str(store), announce=_refuse)
    assert (store / MANIFEST_NAME).read_bytes() == before


def test_store_that_is_cut_short_is_said_to_be_before_anything_is_computed(
    stories_store: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(stories_store, tmp_path / "store"))
    last = sorted((store / "experts").iterdir())[-1]
    os.truncate(last, last.stat().st_size // 2)
    said: list[str] = []
    assert resolve_runnable(str(store), announce=said.append) == store
    assert len(said) == 1 and f"experts/{last.name} of {store} is cut short" in said[0]
