"""The shape of the codec's decoder, read from the store's `code2wav` component and checked. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from extraction.decoder_config import MAX_LAYERS, read_flag, read_size
from extraction.errors import ConfigInvalid
from router.errors import ConfigUnsupported
from router.model_config import ModelConfig
from router.rope_config import read_rope
from router.speech.wish import NUM_CODES, SAMPLES_OF_FRAME

EPSILON = 1e-5
THETA = 10_000.0
TAPS = 7
"""Rows that a convolution looks at."""
DILATIONS = (1, 3, 9)
"""How far these are apart, in the units that follow each other in a stage."""
ENDING_ROWS = 8
"""Of the last matrix, all but one zeros: a matrix of one output takes a path of its own in a library."""
MOST_WINDOW = 4096
"""Frames; bounds what a hostile configuration can make us allocate for each speech."""


@dataclass(frozen=True)
class CodecShape:
    """Names follow the published configuration keys."""

    decoder: ModelConfig
    """Of the decoder that reads frames; it has no vocabulary of its own."""
    codebook_size: int
    upsampling_ratios: tuple[int, ...]
    """How many rows each stage makes of one, before there is sound."""
    upsample_rates: tuple[int, ...]
    """The same while there is; each stage halves the channels."""
    decoder_dim: int
    """Channels of the first of these."""

    @property
    def window(self) -> int:
        """How many frames one depends on within a layer, its own included."""
        assert self.decoder.sliding_window is not None
        return self.decoder.sliding_window

    @property
    def lookback(self) -> int:
        """How many frames before one its samples depend on at most: through every layer's window, and through the
        convolutions, whose rows follow each other ever faster."""
        rate, frames = 1, Fraction(self.decoder.num_layers * (self.window - 1))
        for ratio in self.upsampling_ratios:
            rate *= ratio
            frames += Fraction(TAPS - 1, rate)
        frames += Fraction(TAPS - 1, rate)
        for stage_rate in self.upsample_rates:
            frames += Fraction(1, rate)
            rate *= stage_rate
            frames += Fraction((TAPS - 1) * sum(DILATIONS), rate)
        return math.ceil(frames + Fraction(TAPS - 1, rate)) + 1

    def channels(self, stage: int) -> int:
        """Before the given one of `upsample_rates`, or after the last."""
        return self.decoder_dim >> stage

    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of every product, as they lie in memory."""
        width, first = self.decoder.hidden_size, self.channels(0)
        last = self.channels(len(self.upsample_rates))
        found = [
            *self.decoder.backbone_matrices(),
            (first, TAPS * width),
            (4 * width, width),
            (width, 4 * width),
        ]
        found += [(ratio * width, width) for ratio in self.upsampling_ratios]
        for stage, rate in enumerate(self.upsample_rates):
            inputs, outputs = self.channels(stage), self.channels(stage + 1)
            found += [(rate * outputs, 2 * inputs), (outputs, TAPS * outputs), (outputs, outputs)]
        return [*found, (ENDING_ROWS, TAPS * last)]

    def num_samples(self, num_frames: int) -> int:
        """How many samples so many frames settle: each stage that overlaps waits for one row more."""
        rows = num_frames * math.prod(self.upsampling_ratios)
        for rate in self.upsample_rates:
            rows = max(rows - 1, 0) * rate
        return rows


def read_codec_shape(config: Mapping[str, Any]) -> CodecShape:
    """Raises ConfigUnsupported when a key is out of range or asks for what is not computed here."""
    try:
        ratios, rates = (
            _rates(config, "upsampling_ratios", (2, 2)),
            _rates(config, "upsample_rates", (8, 5, 4, 3)),
        )
        shape = CodecShape(
            _decoder(config),
            read_size(config, "codebook_size", 2048),
            ratios,
            rates,
            read_size(config, "decoder_dim", 1536),
        )
        if read_size(config, "num_quantizers", NUM_CODES) != NUM_CODES:
            raise ConfigInvalid("num_quantizers", f"only {NUM_CODES} codes a frame are spoken")
        if math.prod((*ratios, *rates)) != SAMPLES_OF_FRAME:
            raise ConfigInvalid("upsample_rates", f"only {SAMPLES_OF_FRAME} samples a frame are spoken")
        if not shape.num_samples(1):
            raise ConfigInvalid("upsampling_ratios", "give a frame no samples of its own")
        if shape.decoder_dim % 2 ** len(rates):
            raise ConfigInvalid("decoder_dim", f"{shape.decoder_dim} cannot be halved {len(rates)} times")
    except ConfigInvalid as error:
        raise ConfigUnsupported(f"code2wav_config {error.key}", error.reason) from error
    return shape


def _decoder(config: Mapping[str, Any]) -> ModelConfig:
    layers, width = read_size(config, "num_hidden_layers", 8), read_size(config, "hidden_size", 1024)
    heads = read_size(config, "num_attention_heads", 16)
    kv_heads, head_dim = (
        read_size(config, "num_key_value_heads", heads),
        read_size(config, "head_dim", width // heads or 1),
    )
    window = read_size(config, "sliding_window", 72)
    if heads % kv_heads or head_dim % 2 or layers > MAX_LAYERS or window > MOST_WINDOW:
        raise ConfigInvalid(
            "num_attention_heads", "heads, layers or the window are of no size that is computed"
        )
    if read_flag(config, "attention_bias") or config.get("hidden_act", "silu") != "silu":
        raise ConfigInvalid("hidden_act", "only silu without biases is computed")
    epsilon = config.get("rms_norm_eps", EPSILON)
    if not isinstance(epsilon, float) or not 0.0 < epsilon < 1.0:
        raise ConfigInvalid("rms_norm_eps", f"{epsilon!r} is no number between 0 and 1")
    positions = read_size(config, "max_position_embeddings", 8000)
    return ModelConfig(
        vocab_size=width,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=epsilon,
        rope=read_rope(config, head_dim, positions, THETA),
        max_position_embeddings=positions,
        qk_norm="none",
        has_qkv_bias=False,
        has_output_bias=False,
        clip_qkv=None,
        sliding_window=window,
        windowed_layers=frozenset(range(layers)),
        num_experts=0,
        experts_per_token=1,
        normalise_top_k=False,
        moe_layers=frozenset(),
        expert_width=0,
        shared_width=None,
        dense_width=read_size(config, "intermediate_size", 3072),
        has_tied_head=True,
    )


def _rates(config: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = config.get(key)
    found = default if found is None else found
    if not isinstance(found, list | tuple) or not all(
        type(rate) is int and 1 <= rate <= 64 for rate in found
    ):
        raise ConfigInvalid(key, f"{found!r} is no list of numbers from 1 to 64")
    return tuple(found)
