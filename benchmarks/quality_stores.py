"""The quantised stores that docs/quality.md compares, and the bytes of each: on disk and in memory.

Used by `benchmarks.quality`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experts.store import ExpertStore
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.footprint import measure_footprint
from router.loading import EngineOptions

INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
NOT_QUANTISED = "bf16"
STORES = {
    NOT_QUANTISED: QuantisedParts(),
    "experts int8": QuantisedParts(INT8),
    "all int8": QuantisedParts(INT8, INT8, INT8),
    "experts int4": QuantisedParts(INT4),
    "experts int4, others int8": QuantisedParts(INT4, INT8, INT8),
    "all int4": QuantisedParts(INT4, INT4, INT4),
}


def store_of(name: str, checkpoint: Path, folder: Path) -> Path:
    """One of STORES, extracted where it is not there yet."""
    root = folder / name.replace(", ", "-").replace(" ", "-")
    if not root.exists():
        extract(checkpoint, root, quantised=STORES[name])
    return root


def store_bytes(root: Path) -> dict[str, Any]:
    """Of its weight files; and resident, all experts in memory: of a packed matrix what is packed."""
    store = ExpertStore.open(root)
    try:
        footprint = measure_footprint(store, EngineOptions())
        return {
            "quantization": store.quantised.name,
            "store_bytes": sum(path.stat().st_size for path in root.glob("*/*.safetensors")),
            "backbone_bytes": footprint.backbone_bytes,
            "expert_bytes": footprint.experts.total,
        }
    finally:
        store.close()
