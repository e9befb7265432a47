"""From what a user types as STORE to a store folder: a store, a checkpoint folder, a bundled model's name, or a hub id.

A checkpoint is indexed in place; the index lies in the user's cache folder and is made anew when a file of the
checkpoint changes, or when the index is damaged or another version's. Called by the commands.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from experts.hash_log import LOG_NAME
from extraction.errors import DestinationOccupied, ExtractionError, ManifestInvalid, PathRefused
from extraction.expert_index import read_expert_index
from extraction.extract import extract
from extraction.file_lengths import files_cut_short
from extraction.hub import HubId, parse_hub_id
from extraction.manifest import FORMAT_VERSION, MANIFEST_NAME, check_files, read_manifest
from gateway.errors import CheckpointIsStore, StoreNotFound, StorePartial

CACHE_VARIABLE = "SAGE_MOE_CACHE"
MAX_NAME_CHARS = 50
"""Of the checkpoint's name in its index's; file systems allow 255 bytes in all."""


def bundled_models() -> dict[str, Path]:
    """Checkpoints that come with the package, by the names that commands accept."""
    package = Path(__file__).resolve().parent.parent
    for models in (package / "models", package.parent / "models"):
        stories = models / "stories-moe"
        if (stories / "config.json").is_file():
            return {"stories": stories, "stories-moe": stories}
    return {}


def resolve_checkpoint(source: str) -> Path:
    """The folder that SOURCE names; a folder of that name goes before a bundled model."""
    path = Path(source)
    return path if os.path.isdir(path) else bundled_models().get(source, path)


def published_checkpoint(source: str) -> Path:
    """The same for commands that read a checkpoint and nothing else. Raises CheckpointIsStore."""
    path = resolve_checkpoint(source)
    if os.path.lexists(path / MANIFEST_NAME):
        raise CheckpointIsStore(source)
    return path


def hub_id_of(source: str) -> HubId | None:
    """The model on the hub that SOURCE names. Whatever is here goes before it: paths, then bundled models."""
    if os.path.lexists(source) or source in bundled_models():
        return None
    return parse_hub_id(source)


def model_name(source: str) -> str:
    """What a served STORE is called where the user gave it no name."""
    return Path(source).resolve().name if os.path.isdir(source) else source


def resolve_runnable(source: str, *, announce: Callable[[str], None]) -> Path:
    """A whole store's folder, also from a hub id: its checkpoint is downloaded, and indexed where it then lies.

    announce is called before a download, of files that are cut short, and as in `resolve_store`.
    Raises StorePartial, StoreNotFound, or what downloading and indexing raise.
    """
    hub_id = hub_id_of(source)
    if hub_id is not None:
        from extraction.hub_extract import hub_snapshot

        source = str(hub_snapshot(hub_id, announce=announce))
    root = resolve_store(source, announce=announce)
    manifest = read_manifest(root)
    left_out = manifest.left_out
    if left_out is not None:
        parts = [*left_out.components, *(f"{len(n)} layers of {name}" for name, n in left_out.layers.items())]
        if left_out.groups is not None:
            parts.append(f"the experts of {left_out.groups.total - len(left_out.groups.kept)} groups")
        raise StorePartial(str(root), ", ".join(parts))
    for name in files_cut_short(root, manifest, read_expert_index(root, manifest)):
        announce(f"warning: {name} of {root} is cut short or missing: what is not there cannot be computed")
    return root


def resolve_store(source: str, *, announce: Callable[[str], None], cache_dir: Path | None = None) -> Path:
    """A store's folder. Raises StoreNotFound, or what indexing a checkpoint raises.

    announce: called when an index of ours cannot be used and is made anew. A store that the user named stays as it is.
    """
    path = resolve_checkpoint(source)
    if os.path.lexists(path / MANIFEST_NAME):
        return path
    if not os.path.lexists(path / "config.json"):
        raise StoreNotFound(source, tuple(sorted(bundled_models())))
    checkpoint = path.resolve()
    name = f"{checkpoint.name[:MAX_NAME_CHARS]}-{_fingerprint(checkpoint)}"
    root = (cache_dir or _cache_dir()) / "indexes" / name
    if os.path.lexists(root):
        try:
            _check_index(root, checkpoint)
        except ExtractionError as error:
            announce(f"the index of {checkpoint} is made anew; that in {root} cannot be used: {error}")
            _replace_index(checkpoint, root)
    else:
        _index(checkpoint, root)
    return root


def _index(checkpoint: Path, root: Path) -> None:
    try:
        extract(checkpoint, root, index_only=True)
    except DestinationOccupied:
        # Another process has just made the same index.
        if not os.path.isfile(root / MANIFEST_NAME):
            raise


def _check_index(root: Path, checkpoint: Path) -> None:
    """Raises an ExtractionError when the index cannot be read or is none of this checkpoint."""
    manifest = read_manifest(root)
    if manifest.source_root != str(checkpoint) or manifest.left_out is not None:
        raise ManifestInvalid(MANIFEST_NAME, f"describes something else than all of {checkpoint}")
    check_files(root, manifest)
    read_expert_index(root, manifest)


def _replace_index(checkpoint: Path, root: Path) -> None:
    """What is known of the checkpoint's bytes since their first load is kept."""
    try:
        aside = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}.", suffix=".unusable"))
        try:
            with suppress(FileNotFoundError):  # Another process does the same.
                os.rename(root, aside / "index")
            _index(checkpoint, root)
            with suppress(OSError):
                os.link(aside / "index" / LOG_NAME, root / LOG_NAME, follow_symlinks=False)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise PathRefused(str(root), error.strerror or "cannot be replaced") from error


def _cache_dir() -> Path:
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "sage-moe"
    try:
        return Path.home() / ".cache" / "sage-moe"
    except RuntimeError as error:
        raise PathRefused("~", f"is no home folder to keep an index in; set {CACHE_VARIABLE}") from error


def _fingerprint(checkpoint: Path) -> str:
    """Of the folder's path and its files' names, sizes and times."""
    facts = [str(FORMAT_VERSION), str(checkpoint)]
    try:
        for path in sorted(checkpoint.iterdir()):
            if path.suffix in (".safetensors", ".json", ".txt", ".jinja") and path.is_file():
                stat = path.stat()
                facts.append(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    except OSError as error:
        raise PathRefused(str(error.filename or checkpoint), error.strerror or "cannot be read") from error
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
