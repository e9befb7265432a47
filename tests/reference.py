"""The published implementation (`transformers`), as the parity tests compare with it.

Tolerance: float32 logits within 1e-4 of the largest logit's size; greedy tokens equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from tests.engines import open_engine, run_to_end

RELATIVE_TOLERANCE = 1e-4
NUM_TOKENS = 64


def load_published(checkpoint: Path) -> Any:
    """The decoder that answers text, in float32, with the plainest kernels."""
    import transformers

    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    is_omni = model_type == "qwen3_omni_moe"
    name = "Qwen3OmniMoeThinkerForConditionalGeneration" if is_omni else "AutoModelForCausalLM"
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return getattr(transformers, name).from_pretrained(checkpoint, dtype=torch.float32, **kernels).eval()


def assert_parity(
    store: Path, checkpoint: Path, prompt: tuple[int, ...], num_tokens: int = NUM_TOKENS
) -> None:
    """Greedy tokens equal, and the logits from which each was taken close."""
    with torch.no_grad():
        out = load_published(checkpoint).generate(
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens, logits = out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
    loaded = open_engine(store, EngineOptions(dtype="float32"))
    request = GenerationRequest("r", prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0))
    outcome = run_to_end(loaded.engine, [request])
    loaded.close()
    assert outcome.tokens["r"] == tokens
    worst = (torch.stack(outcome.logits["r"]) - logits).abs().max() / logits.abs().max()
    assert worst < RELATIVE_TOLERANCE


def random_prompt(num_tokens: int, vocab_size: int = 500) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randint(3, vocab_size, (num_tokens,), generator=generator).tolist())
