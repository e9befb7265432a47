"""The audio tower of Qwen3-Omni: from a sound's spectrum to the rows that stand for it in a prompt.

Source: `transformers`, Qwen3OmniMoeAudioEncoder, of which one sound needs this. Made by `router.media.encoder`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from extraction.decoder_config import MAX_LAYERS, read_size
from extraction.errors import ConfigInvalid
from router.errors import ConfigUnsupported
from router.media.facts import CHUNK_FRAMES, halved
from router.media.tower_parts import (
    FeedForward,
    LayerNorm,
    Linear,
    TowerReader,
    activation,
    attend,
    gelu,
)

EPSILON = 1e-5
LONGEST_WAVE = 10_000.0
KERNEL = 3
"""Of the convolutions, with a stride of two and a border of one."""


@dataclass(frozen=True)
class AudioShape:
    """Names follow the published configuration keys."""

    encoder_layers: int
    d_model: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    num_mel_bins: int
    downsample_hidden_size: int
    output_dim: int
    n_window_infer: int
    max_source_positions: int
    activation_function: str


@dataclass(frozen=True)
class _Layer:
    attention_norm: LayerNorm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    final_norm: LayerNorm
    mlp: FeedForward


class AudioTower:
    """Its weights. Safe for several threads."""

    def __init__(self, shape: AudioShape, read: TowerReader) -> None:
        """Raises WeightMismatch, ConfigUnsupported, or what reading the store raises."""
        self._shape = shape
        width, channels = shape.d_model, shape.downsample_hidden_size
        self._convolutions = [
            read.convolution(f"conv2d{number}", (channels, inputs, KERNEL, KERNEL))
            for number, inputs in ((1, 1), (2, channels), (3, channels))
        ]
        bands = halved(shape.num_mel_bins)
        self._conv_out = read.linear("conv_out", width, channels * bands, has_bias=False)
        self._layers = [_read_layer(f"layers.{i}", shape, read) for i in range(shape.encoder_layers)]
        self._last_norm = read.norm("ln_post", width, EPSILON)
        self._head = FeedForward(
            read.linear("proj1", width, width),
            read.linear("proj2", shape.output_dim, width),
            activation(shape.activation_function),
        )
        positions = _waves(halved(CHUNK_FRAMES), width)
        self._positions = positions.to(self._conv_out.weight_OI.dtype)

    @torch.inference_mode()
    def hear(self, mels_MF: Tensor) -> Tensor:
        """(tokens, D), as many as `router.media.facts.sound_tokens` says."""
        hidden_RD = self._embed(mels_MF)
        # In chunks that are all of one length the window is shorter, and a sound of one chunk is within it.
        longest = halved(min(CHUNK_FRAMES, mels_MF.shape[1]))
        window = longest * (self._shape.n_window_infer // CHUNK_FRAMES)
        for layer in self._layers:
            hidden_RD = hidden_RD + self._attention(layer, layer.attention_norm(hidden_RD), window)
            hidden_RD = hidden_RD + layer.mlp(layer.final_norm(hidden_RD))
        return self._head(self._last_norm(hidden_RD))

    def _embed(self, mels_MF: Tensor) -> Tensor:
        """Chunk by chunk; positions begin anew in each."""
        num_frames = mels_MF.shape[1]
        padded = min(num_frames, CHUNK_FRAMES)
        parts = []
        for chunk_MF in torch.split(mels_MF.to(self._conv_out.weight_OI.dtype), CHUNK_FRAMES, dim=1):
            length = halved(chunk_MF.shape[1])
            chunk_MF = F.pad(chunk_MF, (0, padded - chunk_MF.shape[1]))
            embedded_TD = self._convolve(chunk_MF)
            parts.append((embedded_TD + self._positions[: len(embedded_TD)])[:length])
        return torch.cat(parts)

    def _convolve(self, chunk_MF: Tensor) -> Tensor:
        """(tokens, D)."""
        image_CMT = chunk_MF[None]
        for convolution in self._convolutions:
            seen_IR = F.unfold(image_CMT[None], KERNEL, padding=1, stride=2)[0]
            found_RC = gelu(convolution(seen_IR.t().contiguous()))
            shape = [(side + 1) // 2 for side in image_CMT.shape[1:]]
            image_CMT = found_RC.t().reshape(-1, *shape)
        return self._conv_out(image_CMT.permute(2, 0, 1).flatten(1))

    def _attention(self, layer: _Layer, x_RD: Tensor, window: int) -> Tensor:
        heads = self._shape.encoder_attention_heads
        q, k, v = (
            projection(x_RD).reshape(len(x_RD), heads, -1).transpose(0, 1)
            for projection in (layer.q, layer.k, layer.v)
        )
        parts = zip(*(torch.split(x_HRd, window, dim=1) for x_HRd in (q, k, v)), strict=True)
        return layer.out(torch.cat([attend(*part) for part in parts]))


def read_audio_shape(config: Mapping[str, Any]) -> AudioShape:
    """Raises ConfigUnsupported."""
    try:
        shape = AudioShape(
            read_size(config, "encoder_layers", 32),
            read_size(config, "d_model", 1280),
            read_size(config, "encoder_attention_heads", 20),
            read_size(config, "encoder_ffn_dim", 5120),
            read_size(config, "num_mel_bins", 128),
            read_size(config, "downsample_hidden_size", 480),
            read_size(config, "output_dim", 3584),
            read_size(config, "n_window_infer", 800),
            read_size(config, "max_source_positions", 1500),
            str(config.get("activation_function", "gelu")),
        )
        if shape.d_model % (2 * shape.encoder_attention_heads) or shape.encoder_layers > MAX_LAYERS:
            raise ConfigInvalid("d_model", "is not divided by the heads, or there are too many layers")
        if shape.n_window_infer < CHUNK_FRAMES or shape.max_source_positions < halved(CHUNK_FRAMES):
            raise ConfigInvalid("n_window_infer", f"is below one chunk of {CHUNK_FRAMES}")
        if config.get("scale_embedding"):
            raise ConfigInvalid("scale_embedding", "is not computed here")
    except ConfigInvalid as error:
        raise ConfigUnsupported("audio_config", str(error)) from error
    activation(shape.activation_function)
    return shape


def _read_layer(name: str, shape: AudioShape, read: TowerReader) -> _Layer:
    width, inner = shape.d_model, shape.encoder_ffn_dim
    q, k, v, out = (
        read.linear(f"{name}.self_attn.{part}", width, width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj")
    )
    return _Layer(
        read.norm(f"{name}.self_attn_layer_norm", width, EPSILON),
        q,
        k,
        v,
        out,
        read.norm(f"{name}.final_layer_norm", width, EPSILON),
        FeedForward(
            read.linear(f"{name}.fc1", inner, width),
            read.linear(f"{name}.fc2", width, inner),
            activation(shape.activation_function),
        ),
    )


def _waves(length: int, width: int) -> Tensor:
    """(length, width) float32 sines, then cosines."""
    step = math.log(LONGEST_WAVE) / (width // 2 - 1)
    scales = torch.exp(-step * torch.arange(width // 2).float())
    angles = torch.arange(length)[:, None] * scales[None]
    return torch.cat((angles.sin(), angles.cos()), dim=1)
