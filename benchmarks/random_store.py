"""An expert store of random weights that exists in memory only: full width without a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experts.store import ExpertStore
from extraction.layouts import layout_for
from extraction.manifest import ExpertKey, ExpertRecord, RecordPart

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
"""The published configuration; a slice takes fewer layers."""


class RandomStore(ExpertStore):
    """Answers like an opened store. An expert is drawn whenever it is read, always the same."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        (self._layout,) = layout_for(config).components
        assert self._layout.decoder is not None
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)
        expert_width, width = self._layout.decoder.expert_shape("gate")
        self._part_bytes = expert_width * width * dtype.itemsize
        self._seeds = {key: seed for seed, key in enumerate(sorted(self._layout.experts))}
        self._shape = (3 * expert_width, width)

    @property
    def quantization(self) -> None:
        return None

    def expert_keys(self, component: str | None = None) -> tuple[ExpertKey, ...]:
        return tuple(self._seeds)

    def record(self, key: ExpertKey) -> ExpertRecord:
        gate, up, down = (RecordPart(role, "", 0, self._part_bytes) for role in ("gate", "up", "down"))
        return ExpertRecord(key, str(self._dtype).removeprefix("torch."), None, (gate, up, down))

    def window_bytes(self, key: ExpertKey, *, direct: bool) -> int:
        return self.record(key).nbytes

    def read_into(self, key: ExpertKey, window: Tensor, *, direct: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self._seeds[key])
        window.view(self._dtype).view(self._shape).normal_(0.0, self._shape[1] ** -0.5, generator=generator)
        return window

    def read_tensor(self, component: str, name: str) -> Tensor:
        shape = self._layout.backbone_shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        return self._random(*shape)

    def close(self) -> None:
        """Nothing is open."""

    def _random(self, rows: int, columns: int) -> Tensor:
        """Scaled so that activations keep their size."""
        weights = torch.empty(rows, columns, dtype=self._dtype)
        return weights.normal_(0.0, columns**-0.5, generator=self._generator)
