"""Model configurations for tests that need no checkpoint."""

from __future__ import annotations

from typing import Any

from router.model_config import ModelConfig, read_model_config

TINY: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
}


def tiny_config(**overrides: Any) -> ModelConfig:
    return read_model_config(TINY | overrides)
