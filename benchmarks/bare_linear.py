"""The products of one step as bare `F.linear` calls: the same weights and rows, and nothing beside them.

What PyTorch's own kernels make of a step's bytes; used by `bench_roofline`. Only of weights in a float dtype.
"""

from __future__ import annotations

from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step_watch import StepRecord
from extraction.manifest import ExpertKey
from router.loading import LoadedEngine


class BareStep:
    """An engine's own matrices, multiplied with rows of ones."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._component = loaded.store.served.name

    @property
    def is_possible(self) -> bool:
        """Whether every matrix is a plain tensor."""
        backbone = self._loaded.engine.backbone
        plain = [layer.qkv_OD for layer in backbone.layers] + [backbone.head_VD]
        return all(isinstance(matrix, Tensor) for matrix in plain) and isinstance(
            next(iter(self._loaded.worker.cache.weights.values())).gate_up_FD, Tensor
        )

    @torch.inference_mode()
    def seconds(self, record: StepRecord) -> float:
        """Of all products of the step. Every expert gets its rows in one call, as many as it had."""
        loaded, backbone = self._loaded, self._loaded.engine.backbone
        config, dtype = loaded.config, loaded.dtype
        x_TD = torch.ones(record.num_rows, config.hidden_size, dtype=dtype)
        attended = torch.ones(record.num_rows, config.q_width, dtype=dtype)
        most = max((count for layer in record.experts.values() for count in layer.values()), default=1)
        rows_RD = torch.ones(most, config.hidden_size, dtype=dtype)
        rows_RF = torch.ones(most, config.expert_width, dtype=dtype)
        started = perf_counter()
        for index, layer in enumerate(backbone.layers):
            assert isinstance(layer.qkv_OD, Tensor) and isinstance(layer.output_DO, Tensor)
            F.linear(x_TD, layer.qkv_OD)
            F.linear(attended, layer.output_DO)
            if layer.moe is None:
                continue
            F.linear(x_TD, layer.moe.gate_ED)
            for expert, count in record.experts[index].items():
                weights = loaded.worker.cache.weights[ExpertKey(self._component, index, expert)]
                gate_up_FD, down_DF = weights.as_tensors()
                F.linear(rows_RD[:count], gate_up_FD)
                F.linear(rows_RF[:count], down_DF)
        assert isinstance(backbone.head_VD, Tensor)
        F.linear(x_TD, backbone.head_VD)
        return perf_counter() - started
