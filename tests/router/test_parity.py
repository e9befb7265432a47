"""Logits and greedy tokens of Qwen3-MoE against the published implementation, odd shapes included.

The other families: `test_family_parity`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from extraction.extract import extract
from tests.checkpoints import write_tiny_qwen3_moe
from tests.reference import assert_parity, random_prompt

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "head_dim_is_not_width_over_heads": {"head_dim": 24},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads_as_heads": {"num_key_value_heads": 4},
    "one_expert_per_token": {"num_experts_per_tok": 1},
    "every_expert_per_token": {"num_experts_per_tok": 8},
    "weights_not_renormalised": {"norm_topk_prob": False},
    "tied_head": {"tie_word_embeddings": True},
    "dense_layers_by_list": {"num_hidden_layers": 3, "mlp_only_layers": [0, 2]},
    "dense_layers_by_step": {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "odd_sizes": {"hidden_size": 52, "head_dim": 12, "moe_intermediate_size": 19, "vocab_size": 517},
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_random_checkpoint_agrees_with_transformers(shape: str, tmp_path: Path) -> None:
    checkpoint = write_tiny_qwen3_moe(tmp_path / "checkpoint", dtype=torch.float32, **SHAPES[shape])
    store = tmp_path / "store"
    extract(checkpoint, store)
    assert_parity(store, checkpoint, random_prompt(37))


def test_bundled_model_agrees_with_transformers(stories_store: Path, stories_checkpoint: Path) -> None:
    assert_parity(stories_store, stories_checkpoint, random_prompt(90, vocab_size=4096))
