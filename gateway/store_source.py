"""From what a user types as STORE to a store folder: a store, a checkpoint folder, or a bundled model's name.

A checkpoint is indexed in place; the index lies in the user's cache folder and is made anew when a file of the
checkpoint changes. Called by the commands.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from extraction.errors import DestinationOccupied
from extraction.extract import extract
from extraction.manifest import FORMAT_VERSION, MANIFEST_NAME
from gateway.errors import StoreNotFound

CACHE_VARIABLE = "SAGE_MOE_CACHE"


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
    return path if path.is_dir() else bundled_models().get(source, path)


def model_name(source: str) -> str:
    """What a served STORE is called where the user gave it no name."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def resolve_store(source: str, *, cache_dir: Path | None = None) -> Path:
    """A store's folder. Raises StoreNotFound, or what indexing a checkpoint raises."""
    path = resolve_checkpoint(source)
    if (path / MANIFEST_NAME).is_file():
        return path
    if not (path / "config.json").is_file():
        raise StoreNotFound(source, tuple(sorted(bundled_models())))
    checkpoint = path.resolve()
    root = (cache_dir or _cache_dir()) / "indexes" / f"{checkpoint.name}-{_fingerprint(checkpoint)}"
    if not (root / MANIFEST_NAME).is_file():
        try:
            extract(checkpoint, root, index_only=True)
        except DestinationOccupied:
            # Another process has just made the same index.
            if not (root / MANIFEST_NAME).is_file():
                raise
    return root


def _cache_dir() -> Path:
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-moe"


def _fingerprint(checkpoint: Path) -> str:
    """Of the folder's path and its files' names, sizes and times."""
    facts = [str(FORMAT_VERSION), str(checkpoint)]
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".jinja") and path.is_file():
            stat = path.stat()
            facts.append(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
