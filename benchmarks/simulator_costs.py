"""The seconds that the simulator goes by, measured on this machine: none of them is a step of what it predicts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_cluster import Contender, prompts_for
from experts.call import ExpertCall
from router.dispatch import Dispatch
from router.loading import LoadedEngine
from router.scoring import Routing
from router.step_routing import GateOutput, SpanOwner

SHAPES = tuple((experts, rows) for experts in (1, 2, 4, 8, 16, 32) for rows in (1, 2, 4))
"""Experts of a call, and rows of each."""
PAUSE_S = 0.0007
"""Between two calls: about what a router's attention takes, in which an actor's core may sleep."""


class RoutingRecorder:
    """A `RoutingWatcher` that keeps which experts each row of each step was given."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._first = layers[0]
        self._layers = len(layers)
        self._steps: list[list[np.ndarray]] = []

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        if dispatched.call.layer == self._first:
            self._steps.append([])
        self._steps[-1].append(routing.experts_TK.numpy().astype(np.int16))

    def decoded(self, num_streams: int) -> list[np.ndarray]:
        """(T, L, K) of each step in which every stream decoded one token."""
        whole = [step for step in self._steps if len(step) == self._layers and len(step[0]) == num_streams]
        return [np.stack(step, axis=1) for step in whole]


@dataclass(frozen=True)
class Hop:
    """What stands between a router and an actor on the same machine."""

    round_trip_s: float
    message_s: float
    actor_factor: float


def make_call(loaded: LoadedEngine, layer: int, experts: Sequence[int], rows_each: int) -> ExpertCall:
    rows = len(experts) * rows_each
    tokens_TD = torch.randn(max(1, rows_each), loaded.config.hidden_size).to(loaded.dtype)
    token_of_R = tuple(row % rows_each for row in range(rows))
    return ExpertCall(
        loaded.store.served.name, layer, tuple(experts), (rows_each,) * len(experts), token_of_R, tokens_TD
    )


def time_calls(
    loaded: LoadedEngine, run: Callable[[ExpertCall], object], num_rounds: int, pause_s: float
) -> np.ndarray:
    """Median seconds of a call of each of SHAPES, through layers in turn and with experts at random."""
    random = np.random.default_rng(0)
    layers = sorted(loaded.config.moe_layers)
    found: list[list[float]] = [[] for _ in SHAPES]
    for number in range(num_rounds):
        for samples, (num_experts, rows_each) in zip(found, SHAPES, strict=True):
            experts = sorted(random.choice(loaded.config.num_experts, num_experts, replace=False).tolist())
            call = make_call(loaded, layers[number % len(layers)], experts, rows_each)
            waited = perf_counter() + pause_s
            while perf_counter() < waited:
                pass
            began = perf_counter()
            run(call)
            samples.append(perf_counter() - began)
    return np.array([statistics.median(samples) for samples in found])


def fit_worker(seconds: np.ndarray) -> tuple[float, float, float]:
    """call_s, expert_s and expert_row_s that explain the calls of SHAPES best, relative to each."""
    columns = np.array([(1.0, experts, experts * rows - experts) for experts, rows in SHAPES])
    found, *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(seconds)), rcond=None)
    call_s, expert_s, row_s = np.maximum(found, 0.0).tolist()
    return call_s, expert_s, row_s


def fit_hop(here_s: np.ndarray, one_s: np.ndarray, two_s: np.ndarray, halves_s: np.ndarray) -> Hop:
    """From the same calls here, at one actor, and halved between two; half of one takes `halves_s` here."""
    columns = np.stack([np.ones_like(here_s), here_s], axis=1) / one_s[:, None]
    (round_trip_s, factor), *_ = np.linalg.lstsq(columns, np.ones(len(one_s)), rcond=None)
    factor = max(1.0, float(factor))
    both = round_trip_s + factor * halves_s
    message_s = float(np.median(two_s - both))
    return Hop(max(0.0, float(round_trip_s) - message_s), max(0.0, message_s), factor)


def measure_router(served: Contender, num_tokens: int) -> dict[int, tuple[float, float]]:
    """By number of streams: seconds of a step outside the experts' phase, and of a layer's experts phase outside the
    calls, of an engine that computes its experts itself."""
    found = {}
    engine, directory = served.loaded.engine, served.loaded.directory
    for streams in (1, 16):
        spent = [0.0, 0]

        def timed(call: ExpertCall, spent: list[float] = spent) -> Tensor:
            began = perf_counter()
            rows_RD = type(directory).run(directory, call)
            spent[0] += perf_counter() - began
            spent[1] += 1
            return rows_RD

        served.begin(prompts_for(served, streams), num_tokens)
        phases, steps = dict(engine.stats.phase_seconds), engine.stats.steps
        directory.run = timed  # type: ignore[method-assign]
        try:
            while engine.has_work:
                engine.step()
        finally:
            del directory.run
        steps = engine.stats.steps - steps
        delta = {key: value - phases.get(key, 0.0) for key, value in engine.stats.phase_seconds.items()}
        layer_s = (delta["experts"] - spent[0]) / spent[1]
        found[streams] = ((delta["step"] - delta["experts"]) / steps, layer_s)
    return found
