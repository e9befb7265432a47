"""One layer, one token, its experts: the whole block against the same bytes through bare `F.linear` calls.

All experts are resident. Both use the same weights, gate included, on the same token, and alternate; tokens differ from
step to step, so that weights come from memory and not from the processor's caches. Part of `bench_budget`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.budget_contender import anonymous_bytes
from benchmarks.slice_routing import HiddenShape, embedding_rows
from experts.cores import num_cores
from experts.directory import LocalDirectory
from experts.numerics import RowKernel
from experts.store import ExpertStore
from experts.worker import DTYPES, ExpertWorker
from extraction.manifest import ExpertKey
from router.loading import stored_dtype
from router.model_config import ModelConfig, read_model_config
from router.moe_block import MoeBlock
from router.self_test import prove_row_invariance

LAYER = 0


@dataclass(frozen=True)
class LayerSamples:
    """Milliseconds of each counted step, and what experts in host memory cost beside their arithmetic."""

    block_ms: list[float]
    bare_ms: list[float]
    moved_experts: int
    """Experts whose weights lay elsewhere after the run than before."""
    grown_bytes: int
    """Growth of resident memory over the counted steps; a copied expert would show."""
    expert_bytes: int


class OneLayer:
    """A layer of a store with all its experts resident."""

    def __init__(self, store: ExpertStore) -> None:
        component = store.served
        self.config: ModelConfig = read_model_config(component.config)
        dtype = DTYPES[stored_dtype(store)]
        torch.set_num_threads(num_cores())
        self.kernel: RowKernel = prove_row_invariance(self.config, dtype)
        keys = [key for key in store.expert_keys(component.name) if key.layer == LAYER]
        widths = {component.name: self.config.hidden_size}
        self.worker = ExpertWorker(store, self.kernel, dtype, widths=widths, group=keys)
        self.worker.load_all()
        gate_ED = store.read_tensor(component.name, f"layers.{LAYER}.mlp.gate.weight")
        self.block = MoeBlock(
            component.name, LAYER, gate_ED, self.config, self.kernel, LocalDirectory(self.worker)
        )
        self.component, self.keys = component.name, keys

    def hidden(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) inputs of the gate, as the slice's first layer sees them."""
        return embedding_rows(0, count, HiddenShape(self.config.hidden_size), generator).to(self.worker.dtype)

    @torch.inference_mode()
    def run_block(self, hidden_1D: Tensor) -> Tensor:
        """The block as the backbone calls it: rows padded to the kernel's multiple."""
        return self.block.forward(hidden_1D.expand(self.kernel.padded(1), -1), 1)

    @torch.inference_mode()
    def run_bare(self, hidden_1D: Tensor, experts: list[int]) -> Tensor:
        """Only the products, one row each."""
        out = F.linear(hidden_1D, self.block.gate_ED)
        for expert in experts:
            weights = self.worker.cache.weights[ExpertKey(self.component, LAYER, expert)]
            gate_up_FD, down_DF = weights.as_tensors()
            gate_up = F.linear(hidden_1D, gate_up_FD)
            out = F.linear(gate_up[:, : down_DF.shape[1]], down_DF)
        return out

    def pointers(self) -> list[int]:
        return [self.worker.cache.weights[key].as_tensors()[0].data_ptr() for key in self.keys]


def measure_layer(store: ExpertStore, num_steps: int) -> LayerSamples:
    """A fifth more steps come first and are not counted."""
    layer = OneLayer(store)
    num_warm = num_steps // 5
    hidden_TD = layer.hidden(num_steps + num_warm, torch.Generator().manual_seed(2))
    samples: dict[str, list[float]] = {"block": [], "bare": []}
    pointers, resident = layer.pointers(), anonymous_bytes()
    for number, hidden_1D in enumerate(torch.split(hidden_TD, 1)):
        if number == num_warm:
            resident = anonymous_bytes()
        experts = sorted(layer.block.gate(hidden_1D, 1).native().experts_TK[0].tolist())
        contenders: list[tuple[str, Callable[[], Tensor]]] = [
            ("block", lambda hidden=hidden_1D: layer.run_block(hidden)),  # type: ignore[misc]
            ("bare", lambda hidden=hidden_1D, chosen=experts: layer.run_bare(hidden, chosen)),  # type: ignore[misc]
        ]
        for name, run in contenders if number % 2 else contenders[::-1]:
            started = perf_counter()
            run()
            if number >= num_warm:
                samples[name].append((perf_counter() - started) * 1e3)
    moved = sum(before != after for before, after in zip(pointers, layer.pointers(), strict=True))
    return LayerSamples(
        samples["block"],
        samples["bare"],
        moved,
        anonymous_bytes() - resident,
        store.record(layer.keys[0]).nbytes,
    )
