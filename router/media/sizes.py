"""What a tower takes, in bytes, known from its configuration alone: by reading weights that are not there.

Called by `router.footprint` and by `cluster.model_sizes`, which has no store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experts.numerics import RowKernel
from router.media.audio_tower import AudioTower, read_audio_shape
from router.media.encoder import KEPT_BYTES, MOST_WORK_BYTES
from router.media.facts import AUDIO, VISION
from router.media.tower_parts import TowerReader
from router.media.vision_tower import VisionTower, read_vision_shape


class TensorCounter(TowerReader):
    """Gives tensors that have a shape and no memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._kernel, self._dtype, self.nbytes = RowKernel(1), dtype, 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device="meta")
        self.nbytes += tensor.nbytes
        return tensor


def media_bytes(configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> int:
    """The towers, what is kept of what they made, and a bound on what the larger one holds while it computes.

    configs: of a model's components, by name; one without towers takes nothing. Raises ConfigUnsupported.
    """
    count = TensorCounter(dtype)
    if VISION in configs:
        VisionTower(read_vision_shape(configs[VISION]), count)
    if AUDIO in configs:
        AudioTower(read_audio_shape(configs[AUDIO]), count)
    return count.nbytes + KEPT_BYTES + MOST_WORK_BYTES if count.nbytes else 0
