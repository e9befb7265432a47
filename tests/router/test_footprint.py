"""What an engine will hold, known before it is loaded, against what it then holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.store import ExpertStore
from extraction.extract import extract
from router.batcher import BatchLimits
from router.effort import experts_at
from router.errors import ConfigUnsupported
from router.footprint import LIBRARY_BYTES, buffer_bytes, measure_footprint
from router.loading import EngineOptions
from router.means_keeper import StandInOptions
from router.output_means import OutputMeans
from router.scoring import PRESETS
from tests.checkpoints import FAMILIES, write_tiny
from tests.engines import KV_BUDGET_BYTES, open_engine
from tests.router.configs import tiny_config


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_cache_and_experts_are_counted_to_the_byte(
    tmp_path: Path, family: str, dtype: str, is_tied: bool
) -> None:
    if is_tied and family == "qwen3_omni_moe":
        pytest.skip("published untied only")
    checkpoint = write_tiny(family, tmp_path / "checkpoint", tie_word_embeddings=is_tied)
    extract(checkpoint, tmp_path / "store", index_only=True)
    options = EngineOptions(dtype=dtype, kv_budget_bytes=KV_BUDGET_BYTES)
    loaded = open_engine(tmp_path / "store", options)
    loaded.worker.load_all()
    footprint = measure_footprint(loaded.store, options)
    assert footprint.backbone_bytes == loaded.engine.backbone.nbytes
    assert footprint.kv_bytes == loaded.engine.pool.nbytes
    assert footprint.experts.total == loaded.worker.resident_bytes
    loaded.close()


@pytest.mark.parametrize("snarc", ["thrifty", "warm"])
def test_stand_ins_are_counted_to_the_byte_where_they_may_be_asked_for(tiny_store: Path, snarc: str) -> None:
    native = EngineOptions(snarc=PRESETS[snarc])
    options = replace(native, stand_ins=StandInOptions())
    loaded = open_engine(tiny_store, options)
    held = [watcher.nbytes for watcher in loaded.engine.watchers if isinstance(watcher, OutputMeans)]
    assert measure_footprint(loaded.store, options).stand_in_bytes == sum(held)
    assert bool(held) == (snarc == "thrifty")
    assert measure_footprint(loaded.store, native).stand_in_bytes == 0
    loaded.close()


def test_swap_is_counted_only_where_a_sequence_may_lose_its_blocks(tiny_store: Path) -> None:
    store = ExpertStore.open(tiny_store)
    roomy = measure_footprint(store, EngineOptions(limits=BatchLimits(max_running=2)))
    tight = measure_footprint(store, EngineOptions(kv_budget_bytes=1 << 18))
    store.close()
    assert roomy.swap_bytes == 0
    assert tight.swap_bytes == 1 << 18


def test_buffers_grow_with_rows_and_with_running_sequences(stories_store: Path) -> None:
    store = ExpertStore.open(stories_store)

    def buffers(rows: int, running: int) -> int:
        limits = BatchLimits(max_batch_tokens=rows, max_running=running)
        return measure_footprint(store, EngineOptions(limits=limits)).buffer_bytes

    assert buffers(8, 8) < buffers(512, 8) < buffers(512, 256)
    store.close()


def test_buffers_hold_the_answers_of_as_many_experts_as_a_request_may_ask_for() -> None:
    config = tiny_config(hidden_size=1024, num_experts=64, num_experts_per_tok=8)
    limits = BatchLimits(max_batch_tokens=2048)
    found = buffer_bytes(config, torch.bfloat16, limits, 1, ("focus", "auto"))
    assert found > buffer_bytes(config, torch.bfloat16, limits, 1)
    answered = 2048 * experts_at("crisis", 8, 64)
    assert found > LIBRARY_BYTES + answered * 1024 * (2 * 2 + 4), "in parts, joined, and as float32"


def test_unknown_dtype_is_refused_like_by_the_engine(tiny_store: Path) -> None:
    store = ExpertStore.open(tiny_store)
    with pytest.raises(ConfigUnsupported, match="int8"):
        measure_footprint(store, EngineOptions(dtype="int8"))
    store.close()
