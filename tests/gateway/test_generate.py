"""One generation without Ray, of a store whose served decoder is one of several components."""

from __future__ import annotations

from pathlib import Path

import torch

from extraction.extract import extract
from gateway.local.generate import generate
from router.loading import EngineOptions
from tests.checkpoints import write_tiny
from tests.reference import load_published


def test_omni_answers_with_its_thinker(tmp_path: Path) -> None:
    checkpoint = write_tiny("qwen3_omni_moe", tmp_path / "checkpoint")
    extract(checkpoint, tmp_path / "store", index_only=True)
    answer = generate(
        tmp_path / "store",
        "Hello",
        {"max_tokens": 8, "temperature": 0.0},
        EngineOptions(kv_budget_bytes=1 << 24),
    )
    prompt = list(b"Hello")
    assert len(answer.token_ids) == 8
    published = load_published(checkpoint)
    with torch.no_grad():
        out = published.generate(
            torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert out[0, len(prompt) :].tolist() == list(answer.token_ids)
