"""Qwen3-Omni's components: two decoders with experts of their own, and what hears, sees and speaks.

Published names and those that newer `transformers` keep in memory are both known. Pure; called by `extraction.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extraction.backbone_shapes import Shapes, backbone_shapes
from extraction.carried_parts import audio_names, code2wav_names, code_predictor_names, vision_names
from extraction.component_layout import ComponentLayout
from extraction.decoder_config import DecoderShape, read_decoder, read_flag, read_size
from extraction.errors import ConfigInvalid


def omni_components(config: Mapping[str, Any]) -> tuple[ComponentLayout, ...]:
    """The thinker first: it is the decoder that answers text. Raises ConfigInvalid."""
    thinker = _part(config, "thinker_config")
    vision, audio = _part(thinker, "vision_config"), _part(thinker, "audio_config")
    components = [
        _thinker(_part(thinker, "text_config")),
        ComponentLayout(
            "vision",
            vision,
            ("thinker.visual.", "thinker.model.visual."),
            carried_names=vision_names(vision),
        ),
        ComponentLayout(
            "audio",
            audio,
            ("thinker.audio_tower.", "thinker.model.audio_tower."),
            carried_names=audio_names(audio),
        ),
    ]
    if read_flag(config, "enable_audio_output", True):
        components += _speech(_part(config, "talker_config"), _part(config, "code2wav_config"))
    return tuple(components)


def _speech(talker: Mapping[str, Any], code2wav: Mapping[str, Any]) -> list[ComponentLayout]:
    predictor = _part(talker, "code_predictor_config")
    return [
        _talker(talker),
        ComponentLayout(
            "code_predictor",
            predictor,
            ("talker.code_predictor.model.", "talker.code_predictor."),
            is_dense_decoder=True,
            carried_names=code_predictor_names(predictor),
        ),
        ComponentLayout("code2wav", code2wav, ("code2wav.",), carried_names=code2wav_names(code2wav)),
    ]


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


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = config.get(key)
    if not isinstance(part, dict):
        raise ConfigInvalid(key, "is missing or no object")
    return part
