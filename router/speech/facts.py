"""What a store's model speaks with: voices, ids of its prompts and codes, and its own way of drawing them.

Read from a store's description, without PyTorch and without weights. Called by the gateway, which offers voices, and by
`router.speech.speaker`. Source: `transformers`, modeling_qwen3_omni_moe, and its defaults for keys that a configuration
leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extraction.decoder_config import MAX_SIZE, read_size
from extraction.errors import ConfigInvalid
from extraction.manifest import Manifest
from router.errors import ConfigUnsupported
from router.speech.wish import NUM_CODES

THINKER, TALKER, CODE_PREDICTOR, CODE2WAV = "thinker", "talker", "code_predictor", "code2wav"
PARTS_THAT_SPEAK = frozenset((TALKER, CODE_PREDICTOR, CODE2WAV))
"""Components of a store that does."""
NUM_CONTROL_IDS = 1024
"""The last of the talker's ids are no codes; of them only the one that ends a speech is ever drawn."""
MOST_FRAMES = 4096
"""Of one speech, five and a half minutes, whatever a checkpoint recommends."""


@dataclass(frozen=True)
class TurnIds:
    """Of the text's vocabulary."""

    turn_start: int
    user: int
    assistant: int
    speech_start: int
    speech_end: int
    speech_pad: int
    media: frozenset[int]
    """That stand for images, sounds and videos."""
    ends: frozenset[int]
    """That end an answer and are not spoken."""

    @property
    def largest(self) -> int:
        named = self.turn_start, self.user, self.assistant
        return max(*named, self.speech_start, self.speech_end, self.speech_pad)


@dataclass(frozen=True)
class CodecIds:
    """Of the talker's vocabulary: codes, and control ids above them."""

    num_codes: int
    """Of the first code of a frame; every other one is of a codebook of its own, of as many."""
    pad: int
    begin: int
    end: int
    no_thought: int
    thought_begin: int
    thought_end: int

    @property
    def vocab_size(self) -> int:
        return self.num_codes + NUM_CONTROL_IDS


@dataclass(frozen=True)
class SpeechDefaults:
    """How the checkpoint recommends to draw a frame's first code, and how many frames there may be."""

    max_frames: int = MOST_FRAMES
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.05


@dataclass(frozen=True)
class SpeechFacts:
    """All of it."""

    voices: Mapping[str, int]
    """Names in small letters, in the checkpoint's order, and their ids in the talker's vocabulary."""
    turns: TurnIds
    codec: CodecIds
    accept_layer: int
    """After so many of the text decoder's layers its hidden states stand for images and sounds."""
    defaults: SpeechDefaults

    @property
    def default_voice(self) -> str:
        """That of `transformers`, where the checkpoint has it."""
        return "ethan" if "ethan" in self.voices else next(iter(self.voices))


def read_speech_facts(manifest: Manifest) -> SpeechFacts | None:
    """None where the store lacks what speaks. Raises ConfigUnsupported."""
    parts = {component.name: component.config for component in manifest.components}
    if not parts.keys() >= PARTS_THAT_SPEAK | {THINKER}:
        return None
    config = manifest.config
    talker = config.get("talker_config")
    thinker = config.get("thinker_config")
    if not isinstance(talker, dict) or not isinstance(thinker, dict):
        raise ConfigUnsupported("talker_config", "is missing or no object")
    try:
        codec = _codec_ids(talker, parts)
        return SpeechFacts(
            _voices(talker, codec.vocab_size),
            _turn_ids(config, thinker, manifest.generation_config),
            codec,
            _accept_layer(talker, parts[THINKER]),
            _defaults(manifest.generation_config),
        )
    except ConfigInvalid as error:
        raise ConfigUnsupported(f"speech: {error.key}", error.reason) from error


def _turn_ids(
    config: Mapping[str, Any], thinker: Mapping[str, Any], generation: Mapping[str, Any]
) -> TurnIds:
    media = {"audio_token_id": 151646, "image_token_id": 151655, "video_token_id": 151656}
    return TurnIds(
        turn_start=_id(config, "im_start_token_id", 151644),
        user=_id(config, "user_token_id", 872),
        assistant=_id(config, "assistant_token_id", 77091),
        speech_start=_id(config, "tts_bos_token_id", 151672),
        speech_end=_id(config, "tts_eos_token_id", 151673),
        speech_pad=_id(config, "tts_pad_token_id", 151671),
        media=frozenset(_id(thinker, key, default) for key, default in media.items()),
        ends=frozenset((_id(config, "im_end_token_id", 151645), *_ends(generation))),
    )


def _ends(generation: Mapping[str, Any]) -> list[int]:
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return [_id({"eos_token_id": value}, "eos_token_id") for value in ids]


def _codec_ids(talker: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> CodecIds:
    vocab_size = read_size(parts[TALKER], "vocab_size", 3072)
    groups = {
        "num_code_groups": read_size(talker, "num_code_groups", 32),
        "code_predictor_config.num_code_groups": read_size(parts[CODE_PREDICTOR], "num_code_groups", 32),
        "code2wav_config.num_quantizers": read_size(parts[CODE2WAV], "num_quantizers", 16),
    }
    for key, count in groups.items():
        if count != NUM_CODES:
            raise ConfigInvalid(key, f"is {count}; spoken are frames of {NUM_CODES} codes")
    num_codes = vocab_size - NUM_CONTROL_IDS
    for part in (CODE_PREDICTOR, CODE2WAV):
        key = "vocab_size" if part == CODE_PREDICTOR else "codebook_size"
        size = read_size(parts[part], key, 2048)
        if size != num_codes:
            raise ConfigInvalid(f"{part}_config.{key}", f"is {size}, the talker has {num_codes} codes")

    def control(name: str, default: int) -> int:
        found = _id(talker, name, default)
        if not num_codes <= found < vocab_size:
            raise ConfigInvalid(name, f"{found} is none of the ids from {num_codes} to {vocab_size - 1}")
        return found

    return CodecIds(
        num_codes,
        pad=control("codec_pad_id", 4196),
        begin=control("codec_bos_id", 4197),
        end=control("codec_eos_token_id", 4198),
        no_thought=control("codec_nothink_id", 4203),
        thought_begin=control("codec_think_bos_id", 4204),
        thought_end=control("codec_think_eos_id", 4205),
    )


def _voices(talker: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    found = talker.get("speaker_id")
    if not isinstance(found, dict) or not found:
        raise ConfigInvalid("speaker_id", "names no voice")
    voices = {name.lower(): _id(found, name) for name in found}
    outside = [name for name, token_id in voices.items() if token_id >= vocab_size]
    if outside:
        raise ConfigInvalid("speaker_id", f"{outside[0]!r} is outside the vocabulary of {vocab_size}")
    return voices


def _accept_layer(talker: Mapping[str, Any], thinker: Mapping[str, Any]) -> int:
    """The published program takes the last layer's states behind a norm, so the last one is refused."""
    layer, num_layers = read_size(talker, "accept_hidden_layer", 18), read_size(thinker, "num_hidden_layers")
    if layer >= num_layers:
        raise ConfigInvalid("accept_hidden_layer", f"{layer} is not below {num_layers}")
    return layer


def _defaults(generation: Mapping[str, Any]) -> SpeechDefaults:
    usual = SpeechDefaults()
    is_greedy = generation.get("talker_do_sample") is False
    return SpeechDefaults(
        max_frames=min(MOST_FRAMES, read_size(generation, "talker_max_new_tokens", MOST_FRAMES)),
        temperature=0.0 if is_greedy else _number(generation, "talker_temperature", usual.temperature, 0, 2),
        top_k=int(_number(generation, "talker_top_k", usual.top_k, 0, 1 << 31)),
        top_p=_number(generation, "talker_top_p", usual.top_p, 0, 1),
        repetition_penalty=_number(
            generation, "talker_repetition_penalty", usual.repetition_penalty, 0.01, 100
        ),
    )


def _id(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ConfigInvalid(key, f"{value!r} is no token id")
    return value


def _number(config: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigInvalid(key, "is not a number")
    if not low <= value <= high:
        raise ConfigInvalid(key, f"is {value}, outside {low} to {high}")
    return value
