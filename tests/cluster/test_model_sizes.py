"""Bytes from a configuration alone, against those of a store and of the published model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.random_store import QWEN3_30B_A3B
from cluster.model_sizes import measure_model
from experts.store import ExpertStore
from extraction.errors import FamilyUnknown
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.footprint import measure_footprint
from router.loading import EngineOptions
from tests.checkpoints import FAMILIES, write_tiny

INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)


@pytest.mark.parametrize(
    "parts",
    [
        QuantisedParts(),
        QuantisedParts(experts=INT8),
        QuantisedParts(experts=INT4),
        QuantisedParts(backbone=INT8),
        QuantisedParts(INT4, INT4, INT8),
    ],
    ids=lambda parts: parts.name or "float",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_tells_the_same_bytes_as_the_store(
    tmp_path: Path, family: str, parts: QuantisedParts
) -> None:
    checkpoint = write_tiny(family, tmp_path / "checkpoint")
    extract(checkpoint, tmp_path / "store", quantised=parts, index_only=parts.name is None)
    options = EngineOptions(dtype="float32", has_media=True, has_speech=True)
    store = ExpertStore.open(tmp_path / "store")
    footprint = measure_footprint(store, options)
    keys = store.expert_keys(store.served.name)
    config = json.loads((checkpoint / "config.json").read_text())
    model = measure_model(config, torch.float32, parts)
    store.close()
    assert model.backbone_bytes == footprint.backbone_bytes
    assert model.expert_bytes == footprint.experts.largest
    assert model.total_expert_bytes == footprint.experts.total
    assert sorted(model.expert_sizes()) == sorted(keys)
    assert model.router_buffers(options.limits, footprint.kv_bytes) == footprint.buffer_bytes
    assert model.actor_buffers(options.limits) == footprint.actor_buffer_bytes
    assert model.media_bytes == footprint.media_bytes
    assert model.speech_bytes == footprint.speech_bytes
    assert (model.media_bytes > 0) == (model.speech_bytes > 0) == (family == "qwen3_omni_moe")


def test_published_model_has_its_known_sizes() -> None:
    model = measure_model(QWEN3_30B_A3B, torch.bfloat16)
    assert model.num_experts == 6144
    assert model.expert_bytes == 2 * 3 * 2048 * 768
    assert model.kv_bytes_per_token == 2 * 48 * 4 * 128 * 2
    assert model.backbone_bytes - model.active_bytes == 151936 * 2048 * 2
    assert 30.4e9 < (model.total_expert_bytes + model.backbone_bytes) / 2 < 30.6e9


def test_every_token_reads_the_head_and_of_the_embeddings_a_row() -> None:
    tied = QWEN3_30B_A3B | {"tie_word_embeddings": True}
    plain, small = (
        measure_model(tied, torch.bfloat16),
        measure_model(tied, torch.bfloat16, QuantisedParts(head=INT8)),
    )
    embeddings = 151936 * 2048 * 2
    assert plain.active_bytes == plain.backbone_bytes
    assert small.active_bytes == small.backbone_bytes - embeddings
    assert small.active_bytes < plain.active_bytes


def test_cache_for_a_context_holds_that_context() -> None:
    model = measure_model(QWEN3_30B_A3B, torch.bfloat16)
    num_bytes = model.kv_bytes(1000, 4)
    assert 1000 <= model.context_in(num_bytes, 4) < 1000 + 64
    assert model.context_in(0, 1) == 0
    assert model.context_in(1 << 50, 1) == 40960


def test_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(FamilyUnknown, match="gpt2"):
        measure_model({"model_type": "gpt2"}, torch.bfloat16)
