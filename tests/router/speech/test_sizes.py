"""Bytes of what speaks, known before it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.footprint import measure_footprint
from router.kv_cache import KvPool
from router.loading import EngineOptions
from router.model_config import read_model_config
from router.speech.code_predictor import read_predictor_config
from router.speech.codec_shape import read_codec_shape
from router.speech.facts import CODE2WAV, CODE_PREDICTOR, TALKER
from router.speech.opening import DEFAULT_KV_BUDGET_BYTES
from router.speech.sizes import speech_bytes
from router.speech.states import KEPT_BYTES, MOST_OPEN_BYTES
from router.speech.vocoder import stream_blocks
from tests.engines import open_engine

ROPE = {"rope_theta": 1e6, "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default"}}
TALKER_TEXT: dict[str, Any] = ROPE | {
    "num_hidden_layers": 20,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 384,
    "shared_expert_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 3072,
    "intermediate_size": 2048,
    "max_position_embeddings": 65536,
    "model_type": "qwen3_omni_moe_talker_text",
}
CONFIGS: dict[str, dict[str, Any]] = {
    TALKER: TALKER_TEXT,
    CODE_PREDICTOR: {"num_code_groups": 16, "rope_theta": 1e6},
    CODE2WAV: {},
}


def test_published_parts_have_their_known_sizes() -> None:
    """Of Qwen3-Omni-30B-A3B, whose index lists them; what is missing are vectors."""
    talker = 326_254_592
    talker_config = read_model_config(TALKER_TEXT)
    predictor, codec = read_predictor_config(CONFIGS[CODE_PREDICTOR]), read_codec_shape({})
    blocks = KvPool.block_bytes
    beside = (
        DEFAULT_KV_BUDGET_BYTES
        // blocks(talker_config, torch.bfloat16)
        * blocks(talker_config, torch.bfloat16)
        + 9 * blocks(predictor, torch.bfloat16)
        + 8 * stream_blocks(codec) * blocks(codec.decoder, torch.bfloat16)
    )
    found = speech_bytes(CONFIGS, talker, torch.bfloat16) - beside
    listed = talker + 283_140_608 + 432_033_154
    assert listed * 0.99 < found - KEPT_BYTES - MOST_OPEN_BYTES < listed + (64 << 20)


@pytest.fixture(scope="module")
def int8_store(omni_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    int8 = Quantization(scheme="int8", group_size=None)
    folder = tmp_path_factory.mktemp("int8-omni") / "store"
    extract(omni_checkpoint, folder, quantised=QuantisedParts(int8, int8, int8))
    return folder


@pytest.mark.parametrize("store", ["omni_store", "int8_store"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [None, 20_000])
def test_footprint_leaves_room_for_what_speaks(
    store: str, dtype: str, budget: int | None, request: pytest.FixtureRequest
) -> None:
    options = EngineOptions(dtype=dtype, has_speech=True, speech_budget_bytes=budget)
    loaded = open_engine(request.getfixturevalue(store), options)
    assert loaded.speech is not None
    engine = loaded.speech.open()
    while engine.speaker.parts.worker.load_more():
        pass
    counted = measure_footprint(loaded.store, options).speech_bytes
    assert engine.nbytes <= counted - KEPT_BYTES - MOST_OPEN_BYTES < engine.nbytes + (16 << 20)
    engine.close()
    without = replace(options, has_speech=False)
    assert measure_footprint(loaded.store, without).speech_bytes == 0
    loaded.close()
