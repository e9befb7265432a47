"""From what a user types as STORE to a store folder: a store, a checkpoint folder, or a bundled model's name.

A checkpoint is indexed in place; the index lies in the user's cache folder and is made anew when a file of the
checkpoint changes. Called by the commands.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from extraction.errors import DestinationOccupied, PathRefused
from extraction.extract import extract
from extraction.manifest import FORMAT_VERSION, MANIFEST_NAME
from gateway.errors import StoreNotFound

CACHE_VARIABLE = "SAGE_MOE_CACHE"
MAX_NAME_CHARS = 50
"""Of the checkpoint's name in its index's; file systems allow 255 bytes in all."""


def bundled_models() -> dict[str, Path]:
    """Checkpoints that come with the package, by the names that commands accept."""
    package = Path(__file__).resolve().parent
    for models in (package / "models", package.parent / "models"):
        stories = models / "stories-moe"
        if (stories / "config.json").is_file():
            return {"stories": stories, "stories-moe": stories}
    return {}


def resolve_checkpoint(source: str) -> Path:
    """The folder that SOURCE names; a folder of that name goes before a bundled model."""
    path = Path(source)
    return path if os.path.isdir(path) else bundled_models().get(source, path)


def model_name(source: str) -> str:
    """What a served STORE is called where the user gave it no name."""
    return Path(source).resolve().name if os.path.isdir(source) else source


def resolve_store(source: str, *, cache_dir: Path | None = None) -> Path:
    """A store's folder. Raises StoreNotFound, or what indexing a checkpoint raises."""
    path = resolve_checkpoint(source)
    if os.path.lexists(path / MANIFEST_NAME):
        return path
    if not os.path.lexists(path / "config.json"):
        raise StoreNotFound(source, tuple(sorted(bundled_models())))
    checkpoint = path.resolve()
    name = f"{checkpoint.name[:MAX_NAME_CHARS]}-{_fingerprint(checkpoint)}"
    root = (cache_dir or _cache_dir()) / "indexes" / name
    if not os.path.isfile(root / MANIFEST_NAME):
        try:
            extract(checkpoint, root, index_only=True)
        except DestinationOccupied:
            # Another process has just made the same index.
            if not os.path.isfile(root / MANIFEST_NAME):
                raise
    return root


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
