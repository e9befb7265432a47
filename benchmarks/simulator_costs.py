"""The seconds that the simulator goes by, measured on this machine while engines decode: layer after layer through the
real data plane, with what the router does in between.

Each number is looked at where it arises: the router's clock around a call and around everything else, its thread's CPU
time, what actors say of the time they computed, the kernel's account of theirs. Runs have other prompts and numbers of
streams than those that are then foretold, and no engine with more than two actors. One number is left over that nothing
shows directly, `overlap`; it is what makes the simulated runs with two actors as long as those measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, thread_time
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.bench_cluster import Contender, prompts_for
from cluster.placement import split_experts
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.resources import plan_threads
from cluster.simulated_worker import Costs, ModelShape
from cluster.simulator import Report, Simulation
from cluster.topology import NodeFacts, Topology
from experts.call import ExpertCall
from experts.cores import num_cores
from experts.transport import ExpertConnection
from router.dispatch import Dispatch
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner

STREAMS = (2, 6, 24)
TOKENS = 32
"""Of each stream."""
FIRST_SEED = 1000
"""Of prompts; lower ones belong to the runs that are foretold."""


class RoutingRecorder(RoutingWatcher):
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


def record_routing(here: Contender, streams: int, num_tokens: int, first_seed: int = 0) -> list[np.ndarray]:
    """That of every contender, since all give the same tokens."""
    recorder = RoutingRecorder(sorted(here.loaded.config.moe_layers))
    here.loaded.engine.watchers = (recorder,)
    here.decode(prompts_for(here, streams, first_seed), num_tokens)
    here.loaded.engine.watchers = ()
    return recorder.decoded(streams)


@dataclass(frozen=True)
class Size:
    """Of a call or a message."""

    experts: int
    rows: int


@dataclass
class Observed:
    """One run's decoding: sums over its steps."""

    streams: int
    steps: int = 0
    seconds: float = 0.0
    outside_s: float = 0.0
    """The router's, beside the experts' phase."""
    own_s: float = 0.0
    """The router's, of that phase, beside its calls."""
    calls: list[tuple[Size, float]] = field(default_factory=list)
    """With the seconds of each, to its answer."""
    router_cpu_s: float = 0.0
    """Of the router's thread during calls."""
    messages: list[Size] = field(default_factory=list)
    actors_busy_s: float = 0.0
    """As they say themselves."""
    actors_cpu_s: float = 0.0

    @property
    def called_s(self) -> float:
        return sum(seconds for _, seconds in self.calls)

    @property
    def message_rows(self) -> float:
        """Of an average message."""
        return fmean(size.rows for size in self.messages)


def observe(served: Contender, streams: int) -> Observed:
    """Decode TOKENS of each stream."""
    engine, found = served.loaded.engine, Observed(streams)
    served.begin(prompts_for(served, streams, FIRST_SEED), TOKENS)
    phases, steps = dict(engine.stats.phase_seconds), engine.stats.steps
    busy_s, cpu_s = _actors_s(served)
    with _watched(served, found):
        began = perf_counter()
        while engine.has_work:
            engine.step()
        found.seconds = perf_counter() - began
    busy_then_s, cpu_then_s = _actors_s(served)
    found.steps = engine.stats.steps - steps
    spent = {key: value - phases.get(key, 0.0) for key, value in engine.stats.phase_seconds.items()}
    found.outside_s = spent["step"] - spent["experts"]
    found.own_s = spent["experts"] - found.called_s
    found.actors_busy_s, found.actors_cpu_s = busy_then_s - busy_s, cpu_then_s - cpu_s
    return found


@contextmanager
def _watched(served: Contender, found: Observed) -> Iterator[None]:
    directory, start = served.loaded.directory, ExpertConnection.start

    def timed(call: ExpertCall) -> Tensor:
        began, cpu = perf_counter(), thread_time()
        rows_RD = type(directory).run(directory, call)
        found.router_cpu_s += thread_time() - cpu
        found.calls.append((Size(len(call.experts), call.num_rows), perf_counter() - began))
        return rows_RD

    def counted(link: ExpertConnection, call: ExpertCall, **options: Any) -> None:
        found.messages.append(Size(len(call.experts), call.num_rows))
        start(link, call, **options)

    directory.run = timed  # type: ignore[method-assign]
    try:
        with mock.patch.object(ExpertConnection, "start", counted):
            yield
    finally:
        del directory.run


def _actors_s(served: Contender) -> tuple[float, float]:
    """Seconds in which all actors computed since their start, and seconds of CPU that their processes had."""
    busy_s = sum(actor.pulse().busy_s for actor in served.actors)
    files = (path for actor in served.actors for path in Path(f"/proc/{actor.pid}/task").glob("*/schedstat"))
    return busy_s, sum(int(path.read_text().split()[0]) for path in files) / 1e9


Runs = dict[int, list[Observed]]
"""By number of actors."""


def observe_all(here: Contender, one: Contender, two: Contender) -> Runs:
    """One round. here, one, two: an engine without actors, and engines with one and two."""
    contenders = {0: here, 1: one, 2: two}
    return {number: [observe(served, n) for n in STREAMS] for number, served in contenders.items()}


def fit_costs(rounds: Sequence[Runs], here: Contender) -> tuple[Costs, float]:
    """And the round trip. here: the engine without actors."""
    runs = {number: [run for found in rounds for run in found[number]] for number in (0, 1, 2)}
    local, one, two = runs[0], runs[1], runs[2]
    step_s, row_s = _line([(run.streams - 1, run.outside_s / run.steps) for run in local])
    layer_s, layer_row_s = _line([(run.streams - 1, run.own_s / len(run.calls)) for run in local])
    call_s, expert_s, expert_row_s = _fit_worker([call for run in local for call in run.calls])
    message_s, message_row_s = _line([(r.message_rows, r.router_cpu_s / len(r.messages)) for r in two])
    remote = [*one, *two]

    def alone_s(run: Observed) -> float:
        """What the router's own worker would have taken for the same messages."""
        return sum(
            call_s + size.experts * expert_s + (size.rows - size.experts) * expert_row_s
            for size in run.messages
        )

    frame_s = median((run.actors_cpu_s - run.actors_busy_s) / len(run.messages) for run in two)
    hop_s, _ = _line([(r.message_rows, (r.called_s - r.actors_busy_s) / len(r.messages)) for r in one])
    costs = Costs(
        step_s,
        row_s,
        layer_s,
        layer_row_s,
        call_s,
        expert_s,
        expert_row_s,
        message_s,
        message_row_s=message_row_s,
        frame_s=max(0.0, frame_s),
        actor_factor=median(run.actors_busy_s / alone_s(run) for run in remote),
        router_factor=_router_s(remote) / (2 * _router_s(local)),
        threads=plan_threads(num_cores(), 1, here.loaded.config.expert_elements).expert_actor,
    )
    return costs, max(0.0, hop_s - message_s - costs.frame_s)


def fit_overlap(
    here: Contender,
    costs: Costs,
    round_trip_s: float,
    rounds: Sequence[Runs],
    routing: dict[int, list[np.ndarray]],
) -> Costs:
    """With the `overlap` by which two actors took as long as they did. routing: by number of streams."""

    def foretold_s(streams: int, overlap: float) -> float:
        given = replace(costs, overlap=overlap)
        return float(np.median(foretell(here, 2, routing[streams], given, round_trip_s).step_s))

    found = []
    for index, streams in enumerate(STREAMS):
        measured_s = median(runs[2][index].seconds / runs[2][index].steps for runs in rounds)
        none_s, all_s = foretold_s(streams, 0.0), foretold_s(streams, 1.0)
        if none_s > all_s:
            found.append((none_s - measured_s) / (none_s - all_s))
    return replace(costs, overlap=min(1.0, max(0.0, median(found)))) if found else costs


def measure_costs(here: Contender, one: Contender, two: Contender, num_rounds: int) -> tuple[Costs, float]:
    """All of it, and the round trip."""
    routing = {streams: record_routing(here, streams, TOKENS, FIRST_SEED) for streams in STREAMS}
    rounds = [observe_all(here, one, two) for _ in range(num_rounds + 1)][1:]
    costs, round_trip_s = fit_costs(rounds, here)
    return fit_overlap(here, costs, round_trip_s, rounds, routing), round_trip_s


def foretell(
    here: Contender, num_actors: int, routing: Sequence[np.ndarray], costs: Costs, round_trip_s: float
) -> Report:
    """A simulated service with all actors on this machine."""
    store, config = here.loaded.store, here.loaded.config
    component = store.served.name
    keys = tuple(sorted(store.expert_keys(component)))
    shape = ModelShape(
        component,
        tuple(sorted(config.moe_layers)),
        store.record(keys[0]).nbytes,
        config.hidden_size * here.loaded.dtype.itemsize,
    )
    node = NodeFacts("here", "127.0.0.1", 1 << 40, num_cores(), float("inf"), float("inf"), round_trip_s)
    groups = [
        ExpertGroup(f"experts-{index}", group)
        for index, group in enumerate(split_experts(keys, num_actors) if num_actors else ())
    ]
    actors = tuple(ActorPlan(group.name, group.name, "here") for group in groups)
    plan = ServicePlan(tuple(groups), actors, () if groups else keys)
    simulation = Simulation(shape, Topology((node,), "here"), plan, costs)
    for experts_TLK in routing:
        simulation.step(experts_TLK)
    return simulation.report


def _router_s(runs: Sequence[Observed]) -> float:
    """Of the steps of these runs, what the router does itself, calls left out."""
    return sum((run.outside_s + run.own_s) / run.steps for run in runs)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Value at 0 and slope, neither below 0, that explain the medians of points with equal x best, relative to each."""
    values: dict[float, list[float]] = defaultdict(list)
    for x, y in points:
        values[round(x, 1)].append(y)
    y_N = np.array([median(found) for found in values.values()])
    columns_N2 = np.stack([np.ones(len(y_N)), np.array(list(values))], axis=1) / y_N[:, None]
    (start, slope), *_ = np.linalg.lstsq(columns_N2, np.ones(len(y_N)), rcond=None)
    return max(0.0, float(start)), max(0.0, float(slope))


def _fit_worker(calls: Sequence[tuple[Size, float]]) -> tuple[float, float, float]:
    """call_s, expert_s and expert_row_s that explain the medians of equal calls best, relative to each."""
    values: dict[Size, list[float]] = defaultdict(list)
    for size, seconds in calls:
        values[size].append(seconds)
    y = np.array([median(found) for found in values.values()])
    weights = np.sqrt([len(found) for found in values.values()])
    columns = np.array([(1.0, size.experts, size.rows - size.experts) for size in values])
    found, *_ = np.linalg.lstsq(columns * (weights / y)[:, None], weights, rcond=None)
    call_s, expert_s, row_s = np.maximum(found, 0.0).tolist()
    return call_s, expert_s, row_s
