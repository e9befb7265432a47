"""All families, odd configurations and every kind of RoPE included, against the published implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from experts.directory import LocalDirectory
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.extract import extract
from router.backbone import Backbone
from router.kv_cache import KvPool
from router.model_config import read_model_config
from router.request import GenerationRequest, SamplingParams
from router.self_test import prove_row_invariance
from tests.checkpoints import FAMILIES, write_tiny
from tests.engines import RecordingEngine, run_to_end
from tests.reference import NUM_TOKENS, RELATIVE_TOLERANCE, assert_parity, random_prompt

PROMPT_TOKENS = 37
FEW_TOKENS = 12
WINDOW = {"sliding_window": 16}

ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("qwen3_moe", {"attention_bias": True}),
    "window": ("qwen3_moe", {"use_sliding_window": True, **WINDOW}),
    "window_not_used": ("qwen3_moe", {"use_sliding_window": False, **WINDOW}),
    "one_kv_head": ("qwen2_moe", {"num_key_value_heads": 1, "num_experts_per_tok": 1}),
    "every_expert_and_tied": ("qwen2_moe", {"num_experts_per_tok": 8, "tie_word_embeddings": True}),
    "no_biases": ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True}),
    "dense_among_moe": ("qwen2_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "windows_below_a_layer": (
        "qwen2_moe",
        {"use_sliding_window": True, **WINDOW, "num_hidden_layers": 4, "max_window_layers": 2},
    ),
    "windows_by_list": (
        "qwen2_moe",
        {"use_sliding_window": True, **WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "olmoe_one_kv_head": ("olmoe", {"num_key_value_heads": 1, "num_experts_per_tok": 1}),
    "olmoe_every_expert_and_tied": ("olmoe", {"num_experts_per_tok": 8, "tie_word_embeddings": True}),
    "olmoe_clipped_with_biases": ("olmoe", {"clip_qkv": 0.7, "attention_bias": True, "norm_topk_prob": True}),
    "mixtral_one_kv_head": ("mixtral", {"num_key_value_heads": 1, "num_experts_per_tok": 1}),
    "mixtral_every_expert_and_tied": ("mixtral", {"num_experts_per_tok": 8, "tie_word_embeddings": True}),
    "mixtral_window": ("mixtral", {**WINDOW, "head_dim": 24}),
    "omni_one_kv_head": ("qwen3_omni_moe", {"num_key_value_heads": 1, "num_experts_per_tok": 1}),
    "omni_biases_and_dense": (
        "qwen3_omni_moe",
        {"attention_bias": True, "mlp_only_layers": [0], "num_experts_per_tok": 8},
    ),
}
ORIGINAL_CONTEXT = 32
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn_with_scales": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def _check(folder: Path, family: str, prompt_tokens: int, num_tokens: int, overrides: dict[str, Any]) -> None:
    checkpoint = write_tiny(family, folder / "checkpoint", **overrides)
    extract(checkpoint, folder / "store")
    assert_parity(folder / "store", checkpoint, random_prompt(prompt_tokens), num_tokens)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_family_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    _check(tmp_path, family, PROMPT_TOKENS, NUM_TOKENS, {})


@pytest.mark.parametrize("case", list(ODD))
def test_odd_configuration_agrees_with_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = ODD[case]
    _check(tmp_path, family, PROMPT_TOKENS, FEW_TOKENS, overrides)


@pytest.mark.parametrize("prompt_tokens", [ORIGINAL_CONTEXT - 8, ORIGINAL_CONTEXT + 8])
@pytest.mark.parametrize("kind", list(ROPES))
def test_rope_beyond_the_original_context_agrees_with_transformers(
    kind: str, prompt_tokens: int, tmp_path: Path
) -> None:
    """The text passes the original context while it is generated, or its prompt already has."""
    rope = {"rope_theta": 10000.0} | ROPES[kind]
    if rope["rope_type"] in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = ORIGINAL_CONTEXT
    longest = 128 if kind == "llama3" else ORIGINAL_CONTEXT
    overrides = {"rope_parameters": rope, "max_position_embeddings": longest}
    _check(tmp_path, "mixtral", prompt_tokens, 24, overrides)


def test_talker_s_decoder_agrees_with_transformers(tmp_path: Path) -> None:
    """It is not served yet; its shared expert, codec embedding and head are read from the store by the same names."""
    checkpoint = write_tiny("qwen3_omni_moe", tmp_path / "checkpoint")
    extract(checkpoint, tmp_path / "store")
    prompt = random_prompt(PROMPT_TOKENS)
    whole = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    talker = whole.eval().talker
    with torch.no_grad():
        positions = torch.arange(PROMPT_TOKENS).expand(3, 1, -1)
        embedded = talker.model.codec_embedding(torch.tensor([prompt]))
        hidden = talker.model(inputs_embeds=embedded, position_ids=positions).last_hidden_state
        expected = talker.codec_head(hidden)[0, -1]
    store = ExpertStore.open(tmp_path / "store")
    config = read_model_config(store.component("talker").config)
    kernel = prove_row_invariance(config, torch.float32)
    directory = LocalDirectory(
        ExpertWorker(store, kernel, torch.float32, widths={"talker": config.hidden_size})
    )
    backbone = Backbone(store, "talker", config, kernel, directory, torch.float32)
    engine = RecordingEngine(backbone, KvPool(config, 3, torch.float32))
    request = GenerationRequest("r", prompt, SamplingParams(max_tokens=1, temperature=0.0))
    (logits,) = run_to_end(engine, [request]).logits["r"]
    store.close()
    assert (logits - expected).abs().max() / expected.abs().max() < RELATIVE_TOLERANCE
