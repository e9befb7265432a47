"""Qwen3-Omni's components: two decoders with experts of their own, and what hears, sees and speaks.

Published names and those that newer `transformers` keep in memory are both known. Pure; called by `extraction.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extraction.backbone_shapes import Shapes, backbone_shapes
from extraction.component_layout import ComponentLayout
from extraction.decoder_config import DecoderShape, read_decoder, read_flag, read_size
from extraction.errors import ConfigInvalid


def omni_components(config: Mapping[str, Any]) -> tuple[ComponentLayout, ...]:
    """The thinker first: it is the decoder that answers text. Raises ConfigInvalid."""
    thinker = _part(config, "thinker_config")
    components = [
        _thinker(_part(thinker, "text_config")),
        _carried("vision", _part(thinker, "vision_config"), "thinker.visual.", "thinker.model.visual."),
        _carried(
            "audio", _part(thinker, "audio_config"), "thinker.audio_tower.", "thinker.model.audio_tower."
        ),
    ]
    if read_flag(config, "enable_audio_output", True):
        talker = _part(config, "talker_config")
        components += [
            _talker(talker),
            _carried(
                "code_predictor",
                _part(talker, "code_predictor_config"),
                "talker.code_predictor.model.",
                "talker.code_predictor.",
            ),
            _carried("code2wav", _part(config, "code2wav_config"), "code2wav."),
        ]
    return tuple(components)


def _thinker(text: Mapping[str, Any]) -> ComponentLayout:
    config = {**text, "model_type": "qwen3_omni_moe_text"}
    decoder = read_decoder(config)
    return ComponentLayout(
        name="thinker",
        config=config,
        prefixes=("thinker.model.language_model.", "thinker.model.", "thinker."),
        decoder=decoder,
        backbone_shapes=backbone_shapes(decoder),
    )


def _talker(talker: Mapping[str, Any]) -> ComponentLayout:
    """Its codec embedding and head are the decoder's embedding and head; its two projections take the thinker's
    states."""
    text = _part(talker, "text_config")
    config = {**text, "model_type": "qwen3_omni_moe_talker_text"}
    decoder = read_decoder(config)
    inner, thinker_width = read_size(text, "intermediate_size"), read_size(talker, "thinker_hidden_size")
    return ComponentLayout(
        name="talker",
        config=config,
        prefixes=("talker.model.", "talker."),
        decoder=decoder,
        renames=(("codec_embedding.", "embed_tokens."), ("codec_head.", "lm_head.")),
        backbone_shapes=backbone_shapes(decoder) | _projection_shapes(decoder, inner, thinker_width),
    )


def _projection_shapes(decoder: DecoderShape, inner: int, thinker_width: int) -> Shapes:
    shapes: Shapes = {}
    for name in ("text_projection", "hidden_projection"):
        shapes |= {
            f"{name}.linear_fc1.weight": (inner, thinker_width),
            f"{name}.linear_fc1.bias": (inner,),
            f"{name}.linear_fc2.weight": (decoder.hidden_size, inner),
            f"{name}.linear_fc2.bias": (decoder.hidden_size,),
        }
    return shapes


def _carried(name: str, config: Mapping[str, Any], *prefixes: str) -> ComponentLayout:
    return ComponentLayout(name=name, config=config, prefixes=prefixes)


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = config.get(key)
    if not isinstance(part, dict):
        raise ConfigInvalid(key, "is missing or no object")
    return part
