"""Writes small random checkpoints in the published layout, with `transformers`, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
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
    "max_position_embeddings": 256,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 511,
}


def write_tiny_qwen3_moe(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str | None = None,
    **overrides: Any,
) -> Path:
    """A Qwen3-MoE checkpoint with a byte-level tokenizer: token b is byte b, 511 ends a text.

    Norm weights are perturbed, so that one that is forgotten or swapped shows in the output.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(SIZES | overrides))).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    limit = {} if shard_size is None else {"max_shard_size": shard_size}
    model.save_pretrained(path, **limit)
    write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(path: Path) -> None:
    """Ids 0-255 are bytes, 511 is `<|endoftext|>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    vocab |= {f"<unused{number}>": number for number in range(256, 511)} | {"<|endoftext|>": 511}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
