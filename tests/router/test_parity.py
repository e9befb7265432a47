"""Logits and greedy tokens against the published implementation (`transformers`), odd shapes included.

Tolerance: float32 logits within 1e-4 of the largest logit's size; greedy tokens equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from extraction.extract import extract
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from tests.checkpoints import write_tiny_qwen3_moe
from tests.engines import open_engine, run_to_end

RELATIVE_TOLERANCE = 1e-4
NUM_TOKENS = 64

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


def _reference(checkpoint: Path, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
    """64 greedy tokens, and the logits from which each was taken."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def _assert_parity(store: Path, checkpoint: Path, prompt: tuple[int, ...]) -> None:
    tokens, logits = _reference(checkpoint, prompt)
    loaded = open_engine(store, EngineOptions(dtype="float32"))
    request = GenerationRequest("r", prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0))
    outcome = run_to_end(loaded.engine, [request])
    loaded.close()
    assert outcome.tokens["r"] == tokens
    worst = (torch.stack(outcome.logits["r"]) - logits).abs().max() / logits.abs().max()
    assert worst < RELATIVE_TOLERANCE


@pytest.mark.parametrize("shape", list(SHAPES))
def test_random_checkpoint_agrees_with_transformers(shape: str, tmp_path: Path) -> None:
    checkpoint = write_tiny_qwen3_moe(tmp_path / "checkpoint", dtype=torch.float32, **SHAPES[shape])
    store = tmp_path / "store"
    extract(checkpoint, store)
    prompt = tuple(torch.randint(0, 500, (37,), generator=torch.Generator().manual_seed(4)).tolist())
    _assert_parity(store, checkpoint, prompt)


def test_bundled_model_agrees_with_transformers(stories_store: Path, stories_checkpoint: Path) -> None:
    prompt = tuple(torch.randint(3, 4096, (90,), generator=torch.Generator().manual_seed(4)).tolist())
    _assert_parity(stories_store, stories_checkpoint, prompt)
