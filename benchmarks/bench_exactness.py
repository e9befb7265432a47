"""What does exactness cost in a decode step, against the same step with the library's own kernels?

A slice of Qwen3-30B-A3B (full width, a few layers, random weights) decodes one token for 1, 4 and 16 sequences with
300 positions in the cache. "exact" is the engine as it serves. "free" computes the same step without the constraints of
docs/exactness.md: the library's own products without padding, its attention over the whole cache in the model's dtype,
its own silu, and a batched combine. Both use the same weights, caches and routing code, and alternate step by step.

Usage: python -m benchmarks.bench_exactness [--layers N] [--steps N] [--dtype float32] [--keep]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_store import QWEN3_30B_A3B, RandomStore
from benchmarks.report import finish, spread
from experts.call import ExpertCall
from experts.cores import num_cores
from experts.directory import LocalDirectory
from experts.ffn import ExpertWeights
from experts.numerics import RowKernel
from experts.worker import DTYPES, ExpertWorker
from extraction.manifest import ExpertKey
from router.backbone import Backbone
from router.decoder_layer import LayerArithmetic, StepInputs
from router.dispatch import dispatch
from router.kv_cache import KvPool, blocks_for
from router.model_config import read_model_config
from router.moe_block import MoeBlock
from router.rope import rotate
from router.self_test import prove_row_invariance
from router.step_batch import Span, StepBatch
from router.step_routing import NATIVE, StepRouting
from router.weights import Layer

CONTEXT = 300
BATCHES = (1, 4, 16)
GOAL = 1.05


class FreeWorker(LocalDirectory):
    """The library's own products and activation for each expert's rows, however many they are."""

    def table(self, component: str, layer: int) -> None:
        """So that every call comes to `run`."""

    def run(self, call: ExpertCall) -> Tensor:
        rows_RD = call.tokens_TD[list(call.token_of_R)]
        out, first = torch.empty_like(rows_RD), 0
        for expert, count in zip(call.experts, call.counts, strict=True):
            weights = self._weights(ExpertKey(call.component, call.layer, expert))
            gate_up_FD, down_DF = weights.as_tensors()
            gate, up = F.linear(rows_RD[first : first + count], gate_up_FD).chunk(2, dim=1)
            out[first : first + count] = F.linear(F.silu(gate) * up, down_DF)
            first += count
        return out

    def _weights(self, key: ExpertKey) -> ExpertWeights:
        return self.worker.cache.weights[key]


@dataclass(frozen=True)
class FreeMoeBlock(MoeBlock):
    """The same routing; combines by one batched product."""

    def forward(
        self, hidden_PD: Tensor, num_tokens: int, steering: StepRouting = NATIVE, trace: str = ""
    ) -> Tensor:
        gate = self.gate(hidden_PD, num_tokens)
        routing = steering.route(gate)
        dispatched = dispatch(self.component, self.layer, gate.hidden_TD, routing, trace)
        rows_RD = self.directory.run(dispatched.call)
        slots_TKD = rows_RD[dispatched.row_of_slot].view(*routing.weights_TK.shape, -1)
        return torch.bmm(routing.weights_TK.to(slots_TKD.dtype).unsqueeze(1), slots_TKD).squeeze(1)


class FreeArithmetic(LayerArithmetic):
    """Attention by the library, sequence by sequence, as it would be called for one-token queries."""

    def _attend(self, index: int, layer: Layer, normed_PD: Tensor, step: StepInputs, pool: KvPool) -> Tensor:
        cache = step.cache
        assert cache is not None  # a library's kernel has one
        q, k, v = self._queries_keys_values(layer, normed_PD, len(cache.blocks_T))
        q = rotate(q.float(), step.cos, step.sin).to(self.dtype)
        k = rotate(k.float(), step.cos, step.sin).to(self.dtype)
        pool.write(index, cache.blocks_T, cache.offsets_T, k, v)
        attended = torch.empty_like(q)
        for group in cache.groups:
            tables, limits = group.tables_SN, group.limits_SC
            for row, table, limit in zip(group.rows.tolist(), tables, limits[:, 0].tolist(), strict=True):
                keys, values = (
                    p[index][table].transpose(0, 1).flatten(1, 2)[:, :limit] for p in (pool.keys, pool.values)
                )
                out = F.scaled_dot_product_attention(
                    q[row].unsqueeze(1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), enable_gqa=True
                )
                attended[row] = out[0, :, 0]
        return attended.flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each contender and batch")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    exact, free, pool, row_multiple = _contenders(options.layers, DTYPES[options.dtype])
    results = {}
    for num_sequences in BATCHES:
        samples = _measure(exact, free, pool, num_sequences, options.steps)
        ratio = spread([a / b for a, b in zip(samples["exact"], samples["free"], strict=True)])
        results[f"{num_sequences} sequences"] = {
            "exact_ms": spread(samples["exact"]),
            "free_ms": spread(samples["free"]),
            "ratio": ratio,
        }
        print(
            f"{num_sequences:3} sequences: exact {spread(samples['exact'])['median']:7.1f} ms, "
            f"free {spread(samples['free'])['median']:7.1f} ms, ratio {ratio['median']:.3f} "
            f"({ratio['p5']:.3f} to {ratio['p95']:.3f}); goal at most {GOAL}"
        )
    config = {
        "layers": options.layers,
        "context": CONTEXT,
        "row_multiple": row_multiple,
        "dtype": options.dtype,
    }
    finish(f"bench_exactness_{options.dtype}", config, results, is_kept=options.keep)


def _contenders(num_layers: int, dtype: torch.dtype) -> tuple[Backbone, Backbone, KvPool, int]:
    config_json = QWEN3_30B_A3B | {"num_hidden_layers": num_layers}
    store = RandomStore(config_json, dtype)
    config = read_model_config(config_json)
    kernel = prove_row_invariance(config, dtype)
    worker = ExpertWorker(store, kernel, dtype, widths={"model": config.hidden_size})
    worker.load_all()
    exact = Backbone(store, "model", config, kernel, LocalDirectory(worker), dtype)
    free = copy.copy(exact)
    free.kernel = RowKernel(1)
    free.arithmetic = FreeArithmetic(config, free.kernel, dtype)
    free.layers = [
        replace(
            layer,
            moe=FreeMoeBlock(**(vars(layer.moe) | {"directory": FreeWorker(worker), "kernel": free.kernel})),
        )
        for layer in exact.layers
    ]
    num_blocks = 1 + max(BATCHES) * blocks_for(CONTEXT + 1)
    pool = KvPool(config, num_blocks, dtype)
    pool.keys.normal_()
    pool.values.normal_()
    return exact, free, pool, kernel.row_multiple


def _measure(
    exact: Backbone, free: Backbone, pool: KvPool, num_sequences: int, num_steps: int
) -> dict[str, list[float]]:
    """Milliseconds of each step; a fifth more steps come first and are not counted."""
    samples: dict[str, list[float]] = {"exact": [], "free": []}
    per_sequence = blocks_for(CONTEXT + 1)
    tables = [range(1 + i * per_sequence, 1 + (i + 1) * per_sequence) for i in range(num_sequences)]
    spans = tuple(Span(tuple(table), CONTEXT, 1) for table in tables)
    positions = torch.full((3, num_sequences), CONTEXT)
    for step in range(num_steps + num_steps // 5):
        ids = torch.randint(0, exact.config.vocab_size, (num_sequences,))
        batch = StepBatch(spans, ids, positions, tuple(range(num_sequences)))
        contenders: Sequence[tuple[str, Backbone]] = [("exact", exact), ("free", free)]
        for name, backbone in contenders if step % 2 else contenders[::-1]:
            started = perf_counter()
            backbone.forward(batch, pool)
            elapsed_ms = (perf_counter() - started) * 1e3
            if step >= num_steps // 5:
                samples[name].append(elapsed_ms)
    return samples


if __name__ == "__main__":
    main()
