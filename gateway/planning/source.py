"""From what a user names to a model's sizes, without weights: a store, a checkpoint folder, a `config.json`, a bundled
model, or a hub id, of which only `config.json` is downloaded. Called by `gateway.planning.command`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.model_sizes import ModelSizes, measure_model
from experts.store import ExpertStore
from experts.worker import DTYPES
from extraction.errors import CheckpointDamaged
from extraction.hub import HubId, download, look_up
from extraction.manifest import MANIFEST_NAME
from extraction.quantised_parts import NOT_QUANTISED, QuantisedParts
from extraction.strict_json import parse_object
from gateway.errors import OptionInvalid, StoreNotFound
from gateway.stores.source import bundled_models, hub_id_of, resolve_checkpoint
from gateway.text_file import read_text_file
from router.loading import EngineOptions, chosen_dtype

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 << 20
DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for."""

    sizes: ModelSizes
    source: str
    """As `serve` takes it; a placeholder where the user gave a configuration alone."""
    dtype_option: str | None
    """What `--dtype` has to say; None where the default is meant."""
    quantised: QuantisedParts
    is_quantised: bool
    """Whether the store is already; if not, it has to be extracted that way first."""
    has_speech: bool = True
    """Whether it is to speak, where it can."""

    def silent(self) -> PlannedModel:
        """The same without what speaks."""
        return replace(self, sizes=replace(self.sizes, speech_bytes=0), has_speech=False)


def read_model(source: str, dtype: str | None, quantised: QuantisedParts) -> PlannedModel:
    """Raises StoreNotFound, HubRefused, FileUnusable, OptionInvalid, or what reading store or configuration raises."""
    path = resolve_checkpoint(source)
    if os.path.lexists(path / MANIFEST_NAME):
        return _read_store(path, source, dtype, quantised)
    hub_id = hub_id_of(source)
    if hub_id is not None:
        return _of_config(_hub_config(hub_id), source, dtype, quantised)
    if path.is_dir() and os.path.lexists(path / CONFIG):
        return _of_config(_read_config(path / CONFIG), source, dtype, quantised)
    if path.is_file():
        return _of_config(_read_config(path), "CHECKPOINT", dtype, quantised)
    raise StoreNotFound(source, tuple(sorted(bundled_models())))


def _read_store(path: Path, source: str, dtype: str | None, quantised: QuantisedParts) -> PlannedModel:
    store = ExpertStore.open(path)
    try:
        if quantised != NOT_QUANTISED:
            raise OptionInvalid("--quantize", "goes with a checkpoint: a store's weights are as they are")
        computed = chosen_dtype(store, EngineOptions(dtype=dtype))
        sizes = measure_model(store.manifest.config, computed, store.quantised)
        return PlannedModel(sizes, source, dtype, store.quantised, store.quantised != NOT_QUANTISED)
    finally:
        store.close()


def _of_config(
    config: Mapping[str, Any], source: str, dtype: str | None, quantised: QuantisedParts
) -> PlannedModel:
    published = _published_dtype(config)
    name = dtype or (published if published in DTYPES else DEFAULT_DTYPE)
    option = dtype or (None if published in (None, name) else name)
    return PlannedModel(
        measure_model(config, _torch_dtype(name), quantised), source, option, quantised, False
    )


def _torch_dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16"):
        raise OptionInvalid("--dtype", f"must be float32 or bfloat16, not {name[:40]!r}")
    return DTYPES[name]


def _published_dtype(config: Mapping[str, Any]) -> str | None:
    """What the checkpoint's tensors most likely are, under both of the key's names."""
    value = config.get("dtype") or config.get("torch_dtype")
    return value if isinstance(value, str) and value in ("float32", "bfloat16", "float16") else None


def _read_config(path: Path) -> dict[str, Any]:
    return parse_object(read_text_file(str(path), MAX_CONFIG_BYTES).text.encode(), path.name)


def _hub_config(hub_id: HubId) -> dict[str, Any]:
    remote = look_up(hub_id)
    if CONFIG not in remote.sizes:
        raise CheckpointDamaged(str(hub_id), f"has no {CONFIG}: it is no checkpoint in this form")
    with tempfile.TemporaryDirectory(prefix="sage-moe-") as folder:
        return _read_config(download(remote, CONFIG, local_dir=Path(folder)))
