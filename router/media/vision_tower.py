"""The vision tower of Qwen3-Omni: from an image's patches to the rows that stand for it in a prompt.

Source: `transformers`, Qwen3OmniMoeVisionEncoder, of which one still image needs this. Made by `router.media.encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from extraction.decoder_config import MAX_LAYERS, read_size
from extraction.errors import ConfigInvalid
from router.errors import ConfigUnsupported
from router.media.tower_parts import (
    FeedForward,
    LayerNorm,
    Linear,
    TowerReader,
    activation,
    attend,
    gelu,
)
from router.rope import rotate

EPSILON = 1e-6
THETA = 10_000.0


@dataclass(frozen=True)
class VisionShape:
    """Names follow the published configuration keys."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    hidden_act: str

    @property
    def side(self) -> int:
        """Of the square of learned positions."""
        return int(self.num_position_embeddings**0.5)


@dataclass(frozen=True)
class SeenImage:
    """One row a token."""

    rows_ND: Tensor
    deepstack: tuple[Tensor, ...]
    """(N, D) added after the decoder's first layers, one after each."""


@dataclass(frozen=True)
class _Block:
    norm1: LayerNorm
    qkv: Linear
    proj: Linear
    norm2: LayerNorm
    mlp: FeedForward


@dataclass(frozen=True)
class _Merger:
    """Rows of one token side by side become one row; normalised before that, or after."""

    norm: LayerNorm
    mlp: FeedForward
    width: int
    is_normed_after: bool

    def __call__(self, x_RD: Tensor) -> Tensor:
        if self.is_normed_after:
            return self.mlp(self.norm(x_RD.reshape(-1, self.width)))
        return self.mlp(self.norm(x_RD).reshape(-1, self.width))


class VisionTower:
    """Its weights. Safe for several threads."""

    def __init__(self, shape: VisionShape, read: TowerReader) -> None:
        """Raises WeightMismatch, ConfigUnsupported, or what reading the store raises."""
        self._shape = shape
        width, frames, size = shape.hidden_size, shape.temporal_patch_size, shape.patch_size
        self._embed = read.convolution("patch_embed.proj", (width, shape.in_channels, frames, size, size))
        self._positions = read.tensor("pos_embed.weight", shape.num_position_embeddings, width)
        self._blocks = [_read_block(f"blocks.{index}", shape, read) for index in range(shape.depth)]
        self._merger = _read_merger("merger", shape, read, is_normed_after=False)
        self._deepstack = {
            block: _read_merger(f"merger_list.{index}", shape, read, is_normed_after=True)
            for index, block in enumerate(shape.deepstack_visual_indexes)
        }

    @torch.inference_mode()
    def see(self, patches_RI: Tensor, grid: tuple[int, int]) -> SeenImage:
        """grid: rows and columns of tokens. patches_RI: as `router.media.preprocessing.patches` orders them."""
        merge = self._shape.spatial_merge_size
        places_R2 = _places(grid[0], grid[1], merge)
        sides = torch.tensor(grid) * merge
        hidden_RD = self._embed(patches_RI.to(self._positions.dtype))
        hidden_RD = hidden_RD + self._learned_positions(places_R2, sides).to(hidden_RD.dtype)
        cos, sin = self._rotation(places_R2)
        stacked = []
        for index, block in enumerate(self._blocks):
            hidden_RD = hidden_RD + self._attention(block, block.norm1(hidden_RD), cos, sin)
            hidden_RD = hidden_RD + block.mlp(block.norm2(hidden_RD))
            if index in self._deepstack:
                stacked.append(self._deepstack[index](hidden_RD))
        return SeenImage(self._merger(hidden_RD), tuple(stacked))

    def _attention(self, block: _Block, x_RD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self._shape.num_heads
        q_HRd, k_HRd, v_HRd = block.qkv(x_RD).reshape(len(x_RD), 3, heads, -1).permute(1, 2, 0, 3)
        q_HRd, k_HRd = (rotate(part.float(), cos, sin).to(x_RD.dtype) for part in (q_HRd, k_HRd))
        return block.proj(attend(q_HRd, k_HRd, v_HRd))

    def _learned_positions(self, places_R2: Tensor, sides: Tensor) -> Tensor:
        """Of a square whose corners lie on the image's corners, between its four nearest."""
        side = self._shape.side
        where_R2 = places_R2.float() * (side - 1) / (sides - 1).clamp(min=1)
        low_R2 = where_R2.floor()
        high_weight_R2 = where_R2 - low_R2
        total = torch.zeros(len(places_R2), self._shape.hidden_size)
        for row in (0, 1):
            for column in (0, 1):
                step = torch.tensor((row, column))
                near_R2 = (low_R2.long() + step).clamp(max=side - 1)
                weight_R2 = torch.where(step == 1, high_weight_R2, 1 - high_weight_R2)
                vectors_RD = self._positions[near_R2[:, 0] * side + near_R2[:, 1]]
                total += vectors_RD.float() * weight_R2.prod(1, keepdim=True)
        return total

    def _rotation(self, places_R2: Tensor) -> tuple[Tensor, Tensor]:
        """(R, d) float32 cosines and sines: half of the angles from the row, half from the column."""
        spatial = self._shape.hidden_size // self._shape.num_heads // 2
        frequencies = 1.0 / THETA ** (torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
        angles = (places_R2[:, :, None].float() * frequencies).flatten(1)
        angles = torch.cat((angles, angles), dim=1)
        return angles.cos(), angles.sin()


def read_vision_shape(config: Mapping[str, Any]) -> VisionShape:
    """Raises ConfigUnsupported."""
    try:
        stacked = config.get("deepstack_visual_indexes", [8, 16, 24])
        depth = read_size(config, "depth", 27)
        if not isinstance(stacked, list) or sorted(set(stacked)) != stacked or depth > MAX_LAYERS:
            raise ConfigInvalid("deepstack_visual_indexes", "is no ascending list of blocks")
        if not all(type(index) is int and 0 <= index < depth for index in stacked):
            raise ConfigInvalid("deepstack_visual_indexes", f"are not all among the {depth} blocks")
        shape = VisionShape(
            depth,
            read_size(config, "hidden_size", 1152),
            read_size(config, "intermediate_size", 4304),
            read_size(config, "num_heads", 16),
            read_size(config, "in_channels", 3),
            read_size(config, "patch_size", 16),
            read_size(config, "temporal_patch_size", 2),
            read_size(config, "spatial_merge_size", 2),
            read_size(config, "out_hidden_size", 3584),
            read_size(config, "num_position_embeddings", 2304),
            tuple(stacked),
            str(config.get("hidden_act", "gelu_pytorch_tanh")),
        )
        if shape.side**2 != shape.num_position_embeddings:
            raise ConfigInvalid("num_position_embeddings", "is no square")
        if shape.hidden_size % (4 * shape.num_heads) or shape.in_channels != 3:
            raise ConfigInvalid("hidden_size", "heads are not in whole quarters, or colours are not three")
    except ConfigInvalid as error:
        raise ConfigUnsupported("vision_config", str(error)) from error
    activation(shape.hidden_act)
    return shape


def _read_block(name: str, shape: VisionShape, read: TowerReader) -> _Block:
    width, inner = shape.hidden_size, shape.intermediate_size
    return _Block(
        read.norm(f"{name}.norm1", width, EPSILON),
        read.linear(f"{name}.attn.qkv", 3 * width, width),
        read.linear(f"{name}.attn.proj", width, width),
        read.norm(f"{name}.norm2", width, EPSILON),
        FeedForward(
            read.linear(f"{name}.mlp.linear_fc1", inner, width),
            read.linear(f"{name}.mlp.linear_fc2", width, inner),
            activation(shape.hidden_act),
        ),
    )


def _read_merger(name: str, shape: VisionShape, read: TowerReader, *, is_normed_after: bool) -> _Merger:
    width = shape.hidden_size * shape.spatial_merge_size**2
    mlp = FeedForward(
        read.linear(f"{name}.mlp.0", width, width),
        read.linear(f"{name}.mlp.2", shape.out_hidden_size, width),
        gelu,
    )
    norm_width = width if is_normed_after else shape.hidden_size
    return _Merger(read.norm(f"{name}.ln_q", norm_width, EPSILON), mlp, width, is_normed_after)


def _places(rows: int, columns: int, merge: int) -> Tensor:
    """(R, 2) row and column of each patch, the patches of one token side by side."""
    row_R, column_R = torch.meshgrid(torch.arange(rows * merge), torch.arange(columns * merge), indexing="ij")
    cut = rows, merge, columns, merge
    return torch.stack([x.reshape(cut).transpose(1, 2).flatten() for x in (row_R, column_R)], dim=1)
