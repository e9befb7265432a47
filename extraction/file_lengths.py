"""Whether the files that hold a store's weights are there in their whole length, without reading them.

A copy that broke off shows here; bytes that are others are found by their hashes when they are loaded, or by
`extract --verify`. Called by `extraction.summary` and `gateway.stores.source`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from extraction.manifest import ExpertKey, ExpertRecord, Manifest, RecordPart, TensorEntry


def files_cut_short(
    root: Path, manifest: Manifest, index: Mapping[ExpertKey, ExpertRecord]
) -> tuple[str, ...]:
    """Names of weight files that are missing, or end before the last of what lies in them."""
    ends: dict[str, int] = {}
    pieces: list[RecordPart | TensorEntry] = [part for record in index.values() for part in record.parts]
    pieces += [tensor for component in manifest.components for tensor in component.tensors]
    for piece in pieces:
        ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.nbytes)
    folder = root if manifest.source_root is None else Path(manifest.source_root)
    return tuple(name for name, end in sorted(ends.items()) if _length(folder / name) < end)


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
