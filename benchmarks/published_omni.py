"""Qwen3-Omni-30B-A3B's parts that speak, at their published sizes, behind a text's decoder of two layers.

A checkpoint of random weights. Source: the model's `config.json`.

Called by `benchmarks.bench_speech`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from benchmarks.checkpoint_writer import Row, write_random, write_shards
from benchmarks.slice_tokenizer import write_byte_tokenizer

SHARD_BYTES = 4_000_000_000
VOCABULARY = 152_064
TURN_START, TURN_END, USER, ASSISTANT, LINE_BREAK = 151_644, 151_645, 872, 77_091, 198
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
THINKER_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 65_536,
    "rope_parameters": ROPE,
}
"""But for its layers, of which the published one has 48."""
TALKER_TEXT: Mapping[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 384,
    "shared_expert_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 65_536,
    "rope_parameters": ROPE,
}
CODE_PREDICTOR: Mapping[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_code_groups": 16,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
CODE2WAV: Mapping[str, Any] = {
    "codebook_size": 2048,
    "num_quantizers": 16,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "sliding_window": 72,
    "layer_scale_initial_scale": 0.01,
    "decoder_dim": 1536,
    "upsample_rates": [8, 5, 4, 3],
    "upsampling_ratios": [2, 2],
    "max_position_embeddings": 8000,
}
TALKER_IDS: Mapping[str, Any] = {
    "codec_pad_id": 2148,
    "codec_bos_id": 2149,
    "codec_eos_token_id": 2150,
    "codec_nothink_id": 2155,
    "codec_think_bos_id": 2156,
    "codec_think_eos_id": 2157,
    "speaker_id": {"chelsie": 2301, "ethan": 2302, "aiden": 2303},
}
TOKEN_IDS: Mapping[str, int] = {
    "im_start_token_id": TURN_START,
    "im_end_token_id": TURN_END,
    "tts_pad_token_id": 151_671,
    "tts_bos_token_id": 151_672,
    "tts_eos_token_id": 151_673,
    "system_token_id": 8948,
    "user_token_id": USER,
    "assistant_token_id": ASSISTANT,
}
MEDIA_IDS: Mapping[str, int] = {
    "audio_token_id": 151_675,
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "audio_start_token_id": 151_669,
    "vision_start_token_id": 151_652,
}
SMALL_EARS = {"encoder_layers": 1, "d_model": 64, "encoder_attention_heads": 1, "encoder_ffn_dim": 64}
SMALL_EYES = {
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 1,
    "intermediate_size": 64,
    "deepstack_visual_indexes": [0],
}
"""Nothing is heard or seen here."""


def write_speaking_checkpoint(out: Path, *, is_tiny: bool = False) -> None:
    """is_tiny: two layers, eight experts."""
    import transformers

    config = transformers.Qwen3OmniMoeConfig(**_config(is_tiny))
    out.mkdir(parents=True)
    config.save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    settings["architectures"] = ["Qwen3OmniMoeForConditionalGeneration"]
    (out / "config.json").write_text(json.dumps(settings, indent=1))
    with torch.device("meta"):
        model = transformers.Qwen3OmniMoeForConditionalGeneration(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shapes |= _apart(name, tuple(tensor.shape))
    rows: list[Row] = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]
    write_shards(out, rows, SHARD_BYTES, _Weights().fill)
    write_byte_tokenizer(out, VOCABULARY)


class _Weights:
    """Random matrices that keep the size of what passes, and norms that change nothing."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def fill(self, out: BinaryIO, row: Row) -> None:
        name, _, shape, num_bytes = row
        if len(shape) > 1:
            inputs = math.prod(shape[1:])
            write_random(out, self._generator, num_bytes // 2, inputs**-0.5)
            return
        is_neutral = name.endswith(("bias", "alpha", "beta"))
        value = 0.0 if is_neutral else 0.01 if name.endswith("scale") else 1.0
        out.write(torch.full(shape, value, dtype=torch.bfloat16).view(torch.int16).numpy().data)


def _apart(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Experts one by one, as published, where `transformers` has those of a layer together."""
    prefix, _, projection = name.rpartition(".experts.")
    own: dict[str, tuple[int, ...]]
    if projection == "gate_up_proj":
        own = dict.fromkeys(("gate_proj", "up_proj"), (shape[1] // 2, shape[2]))
    elif projection == "down_proj":
        own = {"down_proj": shape[1:]}
    else:
        return {name: shape}
    return {
        f"{prefix}.experts.{expert}.{role}.weight": size
        for expert in range(shape[0])
        for role, size in own.items()
    }


def _config(is_tiny: bool) -> dict[str, Any]:
    less = {"num_hidden_layers": 2, "num_experts": 8} if is_tiny else {}
    fewer = {"num_experts": 8} if is_tiny else {}
    return {
        **TOKEN_IDS,
        "enable_audio_output": True,
        "thinker_config": {
            **MEDIA_IDS,
            "text_config": {**THINKER_TEXT, **fewer},
            "audio_config": {**SMALL_EARS, "output_dim": THINKER_TEXT["hidden_size"]},
            "vision_config": {**SMALL_EYES, "out_hidden_size": THINKER_TEXT["hidden_size"]},
        },
        "talker_config": {
            **MEDIA_IDS,
            **TALKER_IDS,
            "text_config": {**TALKER_TEXT, **less},
            "code_predictor_config": dict(CODE_PREDICTOR),
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
            "num_code_groups": 16,
            "thinker_hidden_size": THINKER_TEXT["hidden_size"],
        },
        "code2wav_config": dict(CODE2WAV),
    }
