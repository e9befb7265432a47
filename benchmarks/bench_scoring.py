"""What does choosing experts by snarc scores cost in a step, against native routing?

A slice of Qwen3-30B-A3B (full width, a few layers, random weights, every expert resident) decodes for 1 and 8
sequences, and computes chunks of a prompt. Several engines over the same weights take turns, step by step: native;
snarc with the default preset; snarc that follows its signals (`auto`, whose number of experts is left at the native one
here); snarc with warmth alone. All choose 8 experts a token, so what differs is the scoring. Each reports the median of
its step over the native one's of the same turn.

Usage: python -m benchmarks.bench_scoring [--layers N] [--steps N] [--keep]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from unittest import mock

import torch

from benchmarks.random_store import QWEN3_30B_A3B, RandomStore
from benchmarks.report import finish, spread
from experts.directory import LocalDirectory
from experts.numerics import num_cores
from experts.worker import ExpertWorker
from router import steering
from router.backbone import Backbone
from router.batcher import BatchLimits
from router.engine import Engine
from router.expert_facts import FactSource
from router.kv_cache import KvPool, blocks_for
from router.model_config import ModelConfig, read_model_config
from router.request import GenerationRequest, SamplingParams
from router.routing_choice import NATIVE_CHOICE, RoutingChoice
from router.scoring import PRESETS
from router.self_test import prove_row_invariance
from router.steering import MoeShape, SteeredPolicy

CONTENDERS = {
    "native": (NATIVE_CHOICE, "scaled"),
    "snarc": (RoutingChoice("snarc"), "scaled"),
    "snarc, signals followed": (RoutingChoice("snarc", "auto"), "scaled"),
    "snarc, warmth alone": (RoutingChoice("snarc"), "warm"),
}
BATCHES = (1, 8)
PROMPT = 64
CHUNK = 256
GOAL = 1.03
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Slice:
    """The model that all engines compute."""

    config: ModelConfig
    backbone: Backbone
    directory: LocalDirectory

    @classmethod
    def of(cls, num_layers: int) -> Slice:
        published = QWEN3_30B_A3B | {"num_hidden_layers": num_layers, "vocab_size": 1024}
        config = read_model_config(published)
        store = RandomStore(published, DTYPE)
        kernel = prove_row_invariance(config, DTYPE)
        worker = ExpertWorker(store, kernel, DTYPE, widths={"model": config.hidden_size})
        worker.load_all()
        directory = LocalDirectory(worker)
        return cls(config, Backbone(store, "model", config, kernel, directory, DTYPE), directory)

    def engine(self, preset: str, num_positions: int, limits: BatchLimits) -> Engine:
        config = self.config
        pool = KvPool(config, blocks_for(num_positions) * limits.max_running + 1, DTYPE)
        engine = Engine(self.backbone, pool, limits)
        layers = tuple(sorted(config.moe_layers))
        shape = MoeShape(config.hidden_size, config.num_experts, config.experts_per_token, layers)
        facts = FactSource("model", config.num_experts, self.directory.resident)
        engine.policy = engine.reporter = SteeredPolicy(shape, facts, PRESETS[preset])
        return engine


def _request(name: str, choice: RoutingChoice, num_prompt: int, max_tokens: int) -> GenerationRequest:
    generator = torch.Generator().manual_seed(hash(name) % 1000)
    prompt = torch.randint(0, 1024, (num_prompt,), generator=generator).tolist()
    return GenerationRequest(name, tuple(prompt), SamplingParams(max_tokens, temperature=0.0), routing=choice)


def _decoding(model: Slice, contender: str, batch: int, steps: int) -> Callable[[], object]:
    """A step of `batch` sequences whose prompts are computed."""
    choice, preset = CONTENDERS[contender]
    max_tokens = steps + 8
    engine = model.engine(preset, PROMPT + max_tokens, BatchLimits(max_running=batch))
    for number in range(batch):
        engine.submit(_request(str(number), choice, PROMPT, max_tokens))
    while engine.stats.generated_tokens < batch:
        engine.step()
    return engine.step


def _prefilling(model: Slice, contender: str, steps: int) -> Callable[[], object]:
    """A step that computes one chunk of a long prompt."""
    choice, preset = CONTENDERS[contender]
    num_prompt = CHUNK * (steps + 8)
    limits = BatchLimits(max_batch_tokens=CHUNK, max_running=1, admission_reserve=1)
    engine = model.engine(preset, num_prompt + 1, limits)
    engine.submit(_request("0", choice, num_prompt, 1))
    return engine.step


def _compare(steps: int, makes: dict[str, Callable[[], object]]) -> dict[str, object]:
    """Alternating steps of all contenders; medians, and the medians of their ratios to native's."""
    seconds: dict[str, list[float]] = {name: [] for name in makes}
    for turn in range(steps + 2):
        for name, step in makes.items():
            started = perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(perf_counter() - started)
    ratios = {
        name: spread([own / native for own, native in zip(times, seconds["native"], strict=True)])
        for name, times in seconds.items()
    }
    return {"step_s": {name: spread(times) for name, times in seconds.items()}, "ratio": ratios}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    model = Slice.of(options.layers)
    results: dict[str, object] = {}
    # Without this `auto` would compute other numbers of experts, and so another step.
    with mock.patch.object(
        steering, "follow", lambda control, *signals, is_free: replace(control, num_seen=control.num_seen + 1)
    ):
        for batch in BATCHES:
            contenders = {name: _decoding(model, name, batch, options.steps) for name in CONTENDERS}
            results[f"decode {batch}"] = _compare(options.steps, contenders)
        steps = max(4, options.steps // 6)
        results[f"prefill {CHUNK}"] = _compare(
            steps, {name: _prefilling(model, name, steps) for name in CONTENDERS}
        )
    config = {"layers": options.layers, "steps": options.steps, "goal": GOAL, "published": QWEN3_30B_A3B}
    finish("bench_scoring", config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
