"""Names and shapes of a decoder's backbone: everything but its experts. Pure; called by `extraction.layouts`."""

from __future__ import annotations

from extraction.decoder_config import DecoderShape

Shapes = dict[str, tuple[int, ...]]


def backbone_shapes(decoder: DecoderShape) -> Shapes:
    """By canonical name; linears are [out, in]."""
    width, vocab = decoder.hidden_size, decoder.vocab_size
    shapes: Shapes = {"embed_tokens.weight": (vocab, width), "norm.weight": (width,)}
    if not decoder.has_tied_head:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(decoder.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
        shapes |= _attention(decoder, prefix + "self_attn.")
        shapes |= _feed_forward(decoder, layer, prefix + "mlp.")
    return shapes


def _attention(decoder: DecoderShape, prefix: str) -> Shapes:
    width, head_dim = decoder.hidden_size, decoder.head_dim
    q_width, kv_width = decoder.num_heads * head_dim, decoder.num_kv_heads * head_dim
    outputs = {"q": q_width, "k": kv_width, "v": kv_width}
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (size, width) for name, size in outputs.items()}
    shapes[prefix + "o_proj.weight"] = (width, q_width)
    if decoder.has_qkv_bias:
        shapes |= {f"{prefix}{name}_proj.bias": (size,) for name, size in outputs.items()}
    if decoder.has_output_bias:
        shapes[prefix + "o_proj.bias"] = (width,)
    if decoder.qk_norm != "none":
        is_per_head = decoder.qk_norm == "per_head"
        shapes[prefix + "q_norm.weight"] = (head_dim if is_per_head else q_width,)
        shapes[prefix + "k_norm.weight"] = (head_dim if is_per_head else kv_width,)
    return shapes


def _feed_forward(decoder: DecoderShape, layer: int, prefix: str) -> Shapes:
    width = decoder.hidden_size
    if layer not in decoder.moe_layers:
        assert decoder.dense_width is not None
        return _gated(prefix, decoder.dense_width, width)
    shapes: Shapes = {prefix + "gate.weight": (decoder.num_experts, width)}
    if decoder.shared_width is not None:
        shapes |= _gated(prefix + "shared_expert.", decoder.shared_width, width)
        shapes[prefix + "shared_expert_gate.weight"] = (1, width)
    return shapes


def _gated(prefix: str, inner: int, width: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (inner, width),
        prefix + "up_proj.weight": (inner, width),
        prefix + "down_proj.weight": (width, inner),
    }
