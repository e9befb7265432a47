"""Room on a device for all experts of a layer that a process is for, side by side in the order of their numbers, as
grouped matmul wants it.

Used by `experts.device_tier` where the budget holds all experts. A layer's room is taken when its first expert comes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from experts.ffn import ExpertWeights
from experts.grouped import ExpertStack, view_stack
from experts.quantised import FloatForm
from experts.store import ExpertStore
from extraction.manifest import ExpertKey


class DeviceStacks:
    def __init__(
        self, store: ExpertStore, form: FloatForm, keys: Collection[ExpertKey], device: torch.device
    ) -> None:
        """form: in which the store's records are used as they are."""
        self.allocated_bytes = 0
        self._form, self._device = form, device
        self._shapes: dict[tuple[str, int], tuple[int, int]] = {}
        self._places: dict[ExpertKey, int] = {}
        for key in sorted(keys):  # a group may have any of a layer's experts
            place, nbytes = self._shapes.get(key[:2], (0, store.record(key).nbytes))
            self._places[key] = place
            self._shapes[key[:2]] = (place + 1, nbytes)
        self._layers: dict[tuple[str, int], tuple[Tensor, ExpertStack]] = {}

    def buffer(self, key: ExpertKey) -> Tensor:
        """The expert's own part, uint8."""
        return self._layer(key)[0][self._places[key]]

    def placed(self, key: ExpertKey, weights: ExpertWeights) -> ExpertWeights:
        """Weights that lie in the expert's part, with where that is."""
        return replace(weights, stack=self._layer(key)[1], place=self._places[key])

    def _layer(self, key: ExpertKey) -> tuple[Tensor, ExpertStack]:
        found = self._layers.get(key[:2])
        if found is None:
            records_EB = torch.empty(self._shapes[key[:2]], dtype=torch.uint8, device=self._device)
            self.allocated_bytes += records_EB.nbytes
            stack = view_stack(records_EB, self._form.dtype, self._form.widths[key.component])
            found = self._layers[key[:2]] = (records_EB, stack)
        return found
