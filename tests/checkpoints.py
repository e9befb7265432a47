"""Writes small random checkpoints in the published layout, with `transformers`, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.slice_tokenizer import write_byte_tokenizer

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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"head_dim": None, "norm_topk_prob": False, "shared_expert_intermediate_size": 56},
    ),
    "olmoe": (
        "Olmoe",
        {"head_dim": None, "num_key_value_heads": 4, "intermediate_size": 24, "norm_topk_prob": False},
    ),
    "mixtral": ("Mixtral", {"num_experts": None, "num_local_experts": 8, "intermediate_size": 24}),
    "qwen3_omni_moe": ("Qwen3OmniMoe", {}),
}
"""Names of the classes in `transformers`, and what a family has otherwise than SIZES."""
OMNI_TOKENS = {
    400: "<|audio_pad|>",
    401: "<|image_pad|>",
    403: "<|audio_start|>",
    404: "<|vision_start|>",
    405: "<|audio_end|>",
    406: "<|vision_end|>",
    407: "<|im_start|>",
    408: "<|im_end|>",
    409: "<tts_pad>",
    410: "<tts_text_bos>",
    411: "<tts_text_eod>",
    412: "<|system|>",
    413: "<|user|>",
    414: "<|assistant|>",
}
"""Roles are one token each, as the published program expects."""
OMNI_TEMPLATE = """{%- for m in messages -%}
{{ '<|im_start|><|' + m.role + '|>\\n' }}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}
{%- if c.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif c.type == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>
{%- elif 'text' in c -%}{{ c.text }}{%- endif -%}
{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|><|assistant|>\\n' }}{% endif %}"""
"""The published one's places and kinds of parts, and less text."""
CODES = 64
VOICES = {"chelsie": 120, "ethan": 121, "aiden": 122}
TALKER_VOCAB = CODES + 1024
"""Codes, and the control ids above them that the published program expects."""


def write_tiny(
    family: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str | None = None,
    is_stacked: bool = False,
    **overrides: Any,
) -> Path:
    """A checkpoint of the family with a byte-level tokenizer: token b is byte b, 511 ends a text.

    Overrides are of the decoder's configuration, of Qwen3-Omni the thinker's. Norm weights and biases are perturbed, so
    that one that is forgotten or swapped shows in the output. is_stacked: experts and names as `transformers` has them
    in memory, not as they are published.
    """
    import transformers

    name, differences = FAMILIES[family]
    sizes = {key: value for key, value in (SIZES | differences | overrides).items() if value is not None}
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{name}Config")
    if family == "qwen3_omni_moe":
        model = transformers.Qwen3OmniMoeForConditionalGeneration(config_class(**_omni_config(sizes)))
    else:
        model = getattr(transformers, f"{name}ForCausalLM")(config_class(**sizes))
    model = model.to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter_name.startswith("talker.") and parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # the published program leaves some of them as memory was
    limit = {} if shard_size is None else {"max_shard_size": shard_size}
    model.save_pretrained(path, save_original_format=not is_stacked, **limit)
    if family == "qwen3_omni_moe":
        write_byte_tokenizer(path, SIZES["vocab_size"], OMNI_TOKENS)
        (path / "chat_template.jinja").write_text(OMNI_TEMPLATE)
    else:
        write_byte_tokenizer(path, SIZES["vocab_size"])
    return path


def write_tiny_qwen3_moe(path: Path, **options: Any) -> Path:
    """See `write_tiny`."""
    return write_tiny("qwen3_moe", path, **options)


def _omni_config(text: dict[str, Any]) -> dict[str, Any]:
    """A whole Qwen3-Omni around this text decoder; every part is there, and every size differs from the published one,
    but for the codec's rates. The spread of its weights makes other codes sound otherwise, and clips hardly any."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    ids = {
        f"{name}_id": 400 + number
        for number, name in enumerate(
            ("audio_token", "image_token", "video_token", "audio_start_token", "vision_start_token")
        )
    }
    width = text["hidden_size"]
    decoder = {"rope_parameters": rope, "initializer_range": 0.2, "head_dim": 16, "num_key_value_heads": 2}
    talker_text = decoder | {
        "vocab_size": TALKER_VOCAB,
        "hidden_size": 48,
        "intermediate_size": 72,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    predictor = talker_text | {"vocab_size": CODES, "num_code_groups": 16, "num_hidden_layers": 2}
    codec = ("pad", "bos", "eos_token", "nothink", "think_bos", "think_eos")
    turns = ("im_start", "im_end", "tts_pad", "tts_bos", "tts_eos", "system", "user", "assistant")
    return {f"{name}_token_id": 407 + number for number, name in enumerate(turns)} | {
        "thinker_config": ids
        | {
            "text_config": {"rope_parameters": rope} | text,
            "audio_config": {
                "num_mel_bins": 128,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 16,
                "output_dim": width,
                "downsample_hidden_size": 4,
            },
            "vision_config": {
                "depth": 3,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": width,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
        },
        "talker_config": ids
        | {f"codec_{name}_id": 100 + number for number, name in enumerate(codec)}
        | {
            "text_config": talker_text,
            "code_predictor_config": predictor,
            "accept_hidden_layer": 1,
            "num_code_groups": 16,
            "thinker_hidden_size": width,
            "spatial_merge_size": 2,
            "speaker_id": VOICES,
        },
        "code2wav_config": {
            "codebook_size": CODES,
            "num_quantizers": 16,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "decoder_dim": 64,
            "sliding_window": 8,
            "initializer_range": 0.08,
        },
    }
