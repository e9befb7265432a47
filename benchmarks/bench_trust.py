"""What does learning trust cost in a step, on a full-width model?

A slice of Qwen3-30B-A3B (full width, a few layers, random weights) decodes one token for 1 and 16 sequences with 300
positions in the cache, and computes a prompt of 256 tokens. "watched" has a trust collector looking on, and for the
prompt the NLL of its sampled positions; "plain" has not. Same weights and caches; they alternate step by step. The
collector looks closely at one layer a step, so on the whole model of 48 layers a step costs more and watching hardly
does: the share on the whole model is the difference over 48 layers' worth of the plain step without its head.

Usage: python -m benchmarks.bench_trust [--layers N] [--steps N] [--dtype float32] [--keep]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from benchmarks.random_store import QWEN3_30B_A3B, RandomStore
from benchmarks.report import finish, spread
from experts.cores import num_cores
from experts.directory import LocalDirectory
from experts.trust_book import empty_book
from experts.worker import DTYPES, ExpertWorker
from router.backbone import Backbone
from router.kv_cache import KvPool, blocks_for
from router.logprobs import prompt_nlls
from router.model_config import read_model_config
from router.request import GenerationRequest
from router.self_test import prove_row_invariance
from router.step_batch import Span, StepBatch
from router.step_routing import SpanOwner, StepRouting
from router.trust_collector import TrustCollector

CONTEXT, PROMPT = 300, 256
WORKLOADS = {"decode 1": (1, CONTEXT, 1), "decode 16": (16, CONTEXT, 1), "prompt 256": (1, 0, PROMPT)}
"""Sequences, first position and rows of each."""
GOAL = 0.02
WHOLE_MODEL_LAYERS = 48


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=100, help="counted decode steps of each contender; prompts: a tenth"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    backbone, pool, collector = _model(options.layers, DTYPES[options.dtype])
    results = {}
    for name, (num_sequences, first, count) in WORKLOADS.items():
        num_steps = options.steps if count == 1 else max(2, options.steps // 10)
        results[name] = _measure(backbone, pool, collector, (num_sequences, first, count), num_steps)
        slice_share, whole_share = results[name]["ratio"]["median"] - 1, results[name]["whole_model_share"]
        print(
            f"{name}: plain {results[name]['plain_ms']['median']:.1f} ms, watched adds {slice_share:.2%} here, "
            f"{whole_share:.2%} of a step of {WHOLE_MODEL_LAYERS} layers; goal below {GOAL:.0%}"
        )
    finish("bench_trust", {"layers": options.layers, "dtype": options.dtype}, results, is_kept=options.keep)


def _model(num_layers: int, dtype: torch.dtype) -> tuple[Backbone, KvPool, TrustCollector]:
    config_json = QWEN3_30B_A3B | {"num_hidden_layers": num_layers}
    store = RandomStore(config_json, dtype)
    config = read_model_config(config_json)
    kernel = prove_row_invariance(config, dtype)
    worker = ExpertWorker(store, kernel, dtype, widths={"model": config.hidden_size})
    worker.load_all()
    backbone = Backbone(store, "model", config, kernel, LocalDirectory(worker), dtype)
    pool = KvPool(config, 1 + 16 * blocks_for(CONTEXT + 1), dtype)
    pool.keys.normal_()
    pool.values.normal_()
    book = empty_book("model", tuple(sorted(config.moe_layers)), config.num_experts)
    return backbone, pool, TrustCollector(book, config.hidden_size)


def _measure(
    backbone: Backbone,
    pool: KvPool,
    collector: TrustCollector,
    workload: tuple[int, int, int],
    num_steps: int,
) -> dict[str, Any]:
    """A fifth more steps come first and are not counted."""
    samples: dict[str, list[float]] = {"plain": [], "watched": []}
    heads: list[float] = []
    for step in range(num_steps + num_steps // 5):
        batch, owners = _batch(backbone.config.vocab_size, workload, step)
        for name in ("plain", "watched") if step % 2 else ("watched", "plain"):
            started = perf_counter()
            if name == "plain":
                head_s = backbone.forward(batch, pool).phase_seconds["head"]
            else:
                _watched_step(backbone, pool, collector, batch, owners)
            elapsed_ms = (perf_counter() - started) * 1e3
            if step >= num_steps // 5:
                samples[name].append(elapsed_ms)
                heads.extend([head_s * 1e3] if name == "plain" else [])
    added = [b - a for a, b in zip(samples["plain"], samples["watched"], strict=True)]
    ratio = spread([b / a for a, b in zip(samples["plain"], samples["watched"], strict=True)])
    plain, head = spread(samples["plain"]), spread(heads)
    layer_ms = (plain["median"] - head["median"]) / len(backbone.layers)
    whole_ms = head["median"] + WHOLE_MODEL_LAYERS * layer_ms
    return {
        "plain_ms": plain,
        "watched_ms": spread(samples["watched"]),
        "added_ms": spread(added),
        "ratio": ratio,
        "whole_model_share": spread(added)["median"] / whole_ms,
    }


def _watched_step(
    backbone: Backbone,
    pool: KvPool,
    collector: TrustCollector,
    batch: StepBatch,
    owners: tuple[SpanOwner, ...],
) -> None:
    """What `Engine` does with a probe and a watcher; one owner where there are sampled positions."""
    asked = [position - owner.first for owner in owners for position in collector.positions(owner)]
    watched = replace(
        batch, scored_rows=tuple(asked), routing=StepRouting(owners=owners, watchers=(collector,))
    )
    output = backbone.forward(watched, pool)
    if asked:
        following = [owners[0].request.prompt_ids[row + 1] for row in asked]
        collector.scored(following, prompt_nlls(output.scored_RD, following, backbone.logits))


def _batch(
    vocab_size: int, workload: tuple[int, int, int], step: int
) -> tuple[StepBatch, tuple[SpanOwner, ...]]:
    num_sequences, first, count = workload
    per_sequence = blocks_for(CONTEXT + 1)
    spans = tuple(
        Span(tuple(range(1 + i * per_sequence, 1 + (i + 1) * per_sequence)), first, count)
        for i in range(num_sequences)
    )
    ids = torch.randint(0, vocab_size, (num_sequences * count,))
    positions = torch.arange(first, first + count).repeat(num_sequences).expand(3, -1)
    ends = tuple(count * (i + 1) - 1 for i in range(num_sequences))
    prompt = tuple(ids.tolist()) if count > 1 else (0,)
    owners = tuple(
        SpanOwner(GenerationRequest(f"{step if count > 1 else 0}-{i}", prompt), first, count)
        for i in range(num_sequences)
    )
    return StepBatch(spans, ids, positions, ends), owners


if __name__ == "__main__":
    main()
