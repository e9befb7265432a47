"""What does choosing experts by snarc scores cost in a step, against native routing?

A slice of Qwen3-30B-A3B (full width, a few layers, random weights, every expert in memory) decodes for 1 and 8
sequences, and computes chunks of a prompt. Several engines over the same weights take turns, step by step: native;
snarc with the default preset, told that another quarter of the experts is resident every time, with a mean known of
every expert, so that as many as can be are replaced; the seed's terms; these with effort that follows the signals (its
number of experts left at the native one); warmth alone.

Every contender is scored and then given the experts of native routing: which and how many different experts a batch
needs is not what is asked here. `ratio` is a step over the native one of the same turn; `added` is the time spent in
the policy beyond native routing's, over the native step, which the noise of the rest does not touch.

Usage: python -m benchmarks.bench_scoring [--layers N] [--steps N] [--keep]
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from unittest import mock

import torch

from benchmarks.random_store import QWEN3_30B_A3B, RandomStore
from benchmarks.report import finish, spread
from experts.cores import num_cores
from experts.directory import LocalDirectory
from experts.worker import ExpertWorker
from router import steering
from router.backbone import Backbone
from router.batcher import BatchLimits
from router.engine import Engine
from router.expert_facts import FactSource, ResidentSource
from router.kv_cache import KvPool, blocks_for
from router.model_config import ModelConfig, read_model_config
from router.output_means import LayerMeans, OutputMeans
from router.request import GenerationRequest, SamplingParams
from router.routing_choice import NATIVE_CHOICE, RoutingChoice, RoutingReport
from router.scoring import PRESETS, Routing
from router.self_test import prove_row_invariance
from router.steering import MoeShape, SteeredPolicy
from router.step_routing import GateOutput, SpanOwner

CONTENDERS = {
    "native": (NATIVE_CHOICE, "scaled"),
    "thrifty": (RoutingChoice("snarc"), "thrifty"),
    "scaled": (RoutingChoice("snarc"), "scaled"),
    "scaled, signals followed": (RoutingChoice("snarc", "auto"), "scaled"),
    "warm": (RoutingChoice("snarc"), "warm"),
}
QUARTER = 4
NUM_DRAWN = 97
MEAN_USES = 1000.0
MEAN_NORM = 0.05
"""Of every expert but one a layer: with it their size is small, so that all but a token's heaviest are replaced."""
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
        facts = FactSource("model", config.num_experts, _changing_residents(config.num_experts))
        means = _means(shape) if PRESETS[preset].stand_in else None
        policy = SteeredPolicy(shape, facts, PRESETS[preset], means)
        engine.policy = engine.reporter = ScoredOnly(policy)
        if means is not None:
            engine.watchers = (means,)
        return engine


def _changing_residents(num_experts: int) -> ResidentSource:
    """Other experts at every question."""
    drawn = random.Random(0)
    some = [frozenset(drawn.sample(range(num_experts), num_experts // QUARTER)) for _ in range(NUM_DRAWN)]
    turns = itertools.cycle(some)
    return lambda component, layer: next(turns)


def _means(shape: MoeShape) -> OutputMeans:
    means = OutputMeans(shape.num_experts, shape.hidden_size, shape.layers)
    norm_E = torch.full((shape.num_experts,), MEAN_NORM)
    norm_E[0] = 1.0
    for layer in shape.layers:
        output_ED = torch.ones(shape.num_experts, shape.hidden_size)
        means.restore(layer, LayerMeans(output_ED, norm_E, torch.full_like(norm_E, MEAN_USES)))
    return means


class ScoredOnly:
    """A policy whose choice is made, timed, and replaced by native routing's; stand-ins are added all the same."""

    def __init__(self, policy: SteeredPolicy) -> None:
        self._policy = policy
        self.seconds = 0.0

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        return False

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing:
        started = perf_counter()
        scored = self._policy.route(owners, gate)
        self.seconds += perf_counter() - started
        return replace(gate.native(), stand_ins=scored.stand_ins)

    def report(self, request_id: str) -> RoutingReport | None:
        return self._policy.report(request_id)

    def forget(self, request_id: str) -> None:
        self._policy.forget(request_id)

    def abandon(self, owners: Sequence[SpanOwner]) -> None:
        self._policy.abandon(owners)


def _request(name: str, choice: RoutingChoice, num_prompt: int, max_tokens: int) -> GenerationRequest:
    generator = torch.Generator().manual_seed(hash(name) % 1000)
    prompt = torch.randint(0, 1024, (num_prompt,), generator=generator).tolist()
    return GenerationRequest(name, tuple(prompt), SamplingParams(max_tokens, temperature=0.0), routing=choice)


def _decoding(model: Slice, contender: str, batch: int, steps: int) -> Engine:
    """A step of `batch` sequences whose prompts are computed."""
    choice, preset = CONTENDERS[contender]
    max_tokens = steps + 8
    engine = model.engine(preset, PROMPT + max_tokens, BatchLimits(max_running=batch))
    for number in range(batch):
        engine.submit(_request(str(number), choice, PROMPT, max_tokens))
    while engine.stats.generated_tokens < batch:
        engine.step()
    return engine


def _prefilling(model: Slice, contender: str, steps: int) -> Engine:
    """A step that computes one chunk of a long prompt."""
    choice, preset = CONTENDERS[contender]
    num_prompt = CHUNK * (steps + 8)
    limits = BatchLimits(max_batch_tokens=CHUNK, max_running=1, admission_reserve=1)
    engine = model.engine(preset, num_prompt + 1, limits)
    engine.submit(_request("0", choice, num_prompt, 1))
    return engine


def _turn(engine: Engine) -> tuple[float, float]:
    """Seconds of a step, and of these in the policy."""
    assert isinstance(engine.policy, ScoredOnly)
    engine.policy.seconds = 0.0
    started = perf_counter()
    engine.step()
    return perf_counter() - started, engine.policy.seconds


def _compare(steps: int, engines: dict[str, Engine]) -> dict[str, object]:
    """Alternating steps of all contenders; medians, and the medians of what compares them with native's."""
    turns: list[dict[str, tuple[float, float]]] = []
    for number in range(steps + 2):
        turn = {name: _turn(engine) for name, engine in engines.items()}
        if number >= 2:
            turns.append(turn)
    found: dict[str, object] = {"step_s": spread([turn["native"][0] for turn in turns])}
    for name in engines:
        if name != "native":
            native = [turn["native"] for turn in turns]
            own = [turn[name] for turn in turns]
            found[name] = {
                "ratio": spread([mine / theirs for (mine, _), (theirs, _) in zip(own, native, strict=True)]),
                "added": spread(
                    [(mine - theirs) / step for (_, mine), (step, theirs) in zip(own, native, strict=True)]
                ),
                "policy_s": spread([seconds for _, seconds in own]),
            }
    return found


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
