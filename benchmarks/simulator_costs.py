"""The seconds that the simulator goes by, measured on this machine while engines decode: layer after layer through the
real data plane, with what the router does in between.

Each number is looked at where it arises: the router's clock around a call and around everything else, its thread's CPU
time, what actors say of the time they computed, the kernel's account of theirs. Without actors all layers are computed
in one call, so that the calls of a worker are looked at in a run of their own. Runs have other prompts and numbers of
streams than those that are then foretold, and no engine with more than two actors. One number is left over that nothing
shows directly, `overlap`; it is what makes the simulated runs with two actors as long as those measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
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
from cluster.simulated_worker import Costs, ModelShape, RouterCosts
from cluster.simulator import Report, Simulation
from cluster.topology import NodeFacts, Topology
from experts.call import ExpertCall
from experts.connection import ExpertConnection
from experts.cores import num_cores
from experts.exchange import Exchange
from router.dispatch import Dispatch
from router.native_dispatch import NativeDispatch
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner

STREAMS = (2, 6, 24)
TOKENS = 32
"""Of each stream."""
FIRST_SEED = 1000
"""Of prompts; lower ones belong to the runs that are foretold."""


class Looker(RoutingWatcher):
    """A `RoutingWatcher` that keeps nothing: every layer is computed by calls of its own, as with actors."""

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        return


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
    """With the seconds of each, to its answer. None where layers go together in one call."""
    router_cpu_s: float = 0.0
    """Of the router's thread during calls."""
    asking_cpu_s: float = 0.0
    """Of the same thread while the C source goes through layers that it asks for: calls, and all between them."""
    messages: list[Size] = field(default_factory=list)
    watched_s: float = 0.0
    """What it took to note all this, which is in no other sum."""
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


def observe(served: Contender, streams: int, watchers: tuple[RoutingWatcher, ...] = ()) -> Observed:
    """Decode TOKENS of each stream."""
    engine, found = served.loaded.engine, Observed(streams)
    engine.watchers = watchers
    served.begin(prompts_for(served, streams, FIRST_SEED), TOKENS)
    phases, steps = dict(engine.stats.phase_seconds), engine.stats.steps
    busy_s, cpu_s = _actors_s(served)
    with _watched(served, found):
        began = perf_counter()
        while engine.has_work:
            engine.step()
        found.seconds = perf_counter() - began - found.watched_s
    busy_then_s, cpu_then_s = _actors_s(served)
    found.steps = engine.stats.steps - steps
    spent = {key: value - phases.get(key, 0.0) for key, value in engine.stats.phase_seconds.items()}
    found.outside_s = spent["step"] - spent["experts"]
    found.own_s = spent["experts"] - found.called_s - found.watched_s
    if found.asking_cpu_s:
        in_calls_s = found.asking_cpu_s - found.watched_s - spent["attention"] - found.own_s
        found.router_cpu_s += max(0.0, in_calls_s)
    found.actors_busy_s, found.actors_cpu_s = busy_then_s - busy_s, cpu_then_s - cpu_s
    engine.watchers = ()
    return found


@contextmanager
def _watched(served: Contender, found: Observed) -> Iterator[None]:
    directory, start = served.loaded.directory, ExpertConnection.start
    end, ask = Exchange.end, NativeDispatch.ask

    def timed(call: ExpertCall) -> Tensor:
        began, cpu = perf_counter(), thread_time()
        rows_RD = type(directory).run(directory, call)
        found.router_cpu_s += thread_time() - cpu
        found.calls.append((Size(len(call.experts), call.num_rows), perf_counter() - began))
        return rows_RD

    def counted(link: ExpertConnection, call: ExpertCall, **options: Any) -> None:
        found.messages.append(Size(len(call.experts), call.num_rows))
        start(link, call, **options)

    def told(exchange: Exchange) -> None:
        began = perf_counter()
        for errands in map(exchange.answered, range(exchange.num_done)):
            sizes = [Size(errand.num_experts, errand.num_rows) for errand in errands]
            asked_ns, answered_ns = (min(e.asked_ns for e in errands), max(e.answered_ns for e in errands))
            whole = Size(sum(size.experts for size in sizes), sum(size.rows for size in sizes))
            found.calls.append((whole, (answered_ns - asked_ns) * 1e-9))
            found.messages += sizes
        found.watched_s += perf_counter() - began
        end(exchange)

    def asked(dispatching: NativeDispatch, *arguments: Any) -> Any:
        cpu = thread_time()
        try:
            return ask(dispatching, *arguments)
        finally:
            found.asking_cpu_s += thread_time() - cpu

    directory.run = timed  # type: ignore[method-assign]
    try:
        with (
            mock.patch.object(ExpertConnection, "start", counted),
            mock.patch.object(Exchange, "end", told),
            mock.patch.object(NativeDispatch, "ask", asked),
        ):
            yield
    finally:
        del directory.run


def _actors_s(served: Contender) -> tuple[float, float]:
    """Seconds in which all actors computed since their start, and seconds of CPU that their processes had."""
    busy_s = sum(actor.pulse().busy_s for actor in served.actors)
    files = (path for actor in served.actors for path in Path(f"/proc/{actor.pid}/task").glob("*/schedstat"))
    return busy_s, sum(int(path.read_text().split()[0]) for path in files) / 1e9


@dataclass(frozen=True)
class Runs:
    """One round, or all of them: a run for every number of streams."""

    near: list[Observed]
    """Without actors."""
    looked: list[Observed]
    """The same with every layer looked at, so that its worker's calls show."""
    one: list[Observed]
    two: list[Observed]
    """With so many actors."""

    @staticmethod
    def joined(rounds: Sequence[Runs]) -> Runs:
        near, looked, one, two = (
            [run for runs in rounds for run in kind(runs)]
            for kind in (attrgetter("near"), attrgetter("looked"), attrgetter("one"), attrgetter("two"))
        )
        return Runs(near, looked, one, two)


def observe_all(here: Contender, one: Contender, two: Contender) -> Runs:
    """One round. here, one, two: an engine without actors, and engines with one and two."""
    return Runs(
        [observe(here, streams) for streams in STREAMS],
        [observe(here, streams, (Looker(),)) for streams in STREAMS],
        [observe(one, streams) for streams in STREAMS],
        [observe(two, streams) for streams in STREAMS],
    )


def fit_costs(rounds: Sequence[Runs], here: Contender) -> tuple[Costs, float]:
    """And the round trip. here: the engine without actors.

    With one actor router and actor have a core each, and look for each other's bytes; what a message costs them is then
    seen in its time alone. With two they sleep and are woken, which shows in the time of their cores.
    """
    runs = Runs.joined(rounds)
    one, two = runs.one, runs.two
    worker = _fit_worker([call for run in runs.looked for call in run.calls])
    woken_s, message_row_s = _line([(r.message_rows, r.router_cpu_s / len(r.messages)) for r in two])
    frame_s = max(0.0, median((run.actors_cpu_s - run.actors_busy_s) / len(run.messages) for run in two))
    hop_s, _ = _line([(r.message_rows, (r.called_s - r.actors_busy_s) / len(r.messages)) for r in one])
    alone = min(1.0, hop_s / (woken_s + frame_s))
    far, crowded = _far_costs(one), _far_costs(two)
    costs = Costs(
        _near_costs(runs),
        far,
        *worker,
        alone * woken_s,
        message_row_s=message_row_s,
        frame_s=alone * frame_s,
        actor_factor=median(run.actors_busy_s / _alone_s(run, worker) for run in one),
        crowded_work=max(1.0, median(crowded.of_step(n) / far.of_step(n) for n in STREAMS)),
        crowded_messages=1.0 / alone,
        threads=plan_threads(num_cores(), 1, here.loaded.config.expert_elements).expert_actor,
    )
    return costs, max(0.0, hop_s - woken_s - frame_s)


def _alone_s(run: Observed, worker: tuple[float, float, float]) -> float:
    """What the router's own worker would have taken for the same messages."""
    call_s, expert_s, expert_row_s = worker
    return sum(
        call_s + size.experts * expert_s + (size.rows - size.experts) * expert_row_s for size in run.messages
    )


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
        measured_s = median(runs.two[index].seconds / runs.two[index].steps for runs in rounds)
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


def _near_costs(runs: Runs) -> RouterCosts:
    """A layer takes what its worker's calls take where they are looked at, and this."""
    layers = [
        (run.streams - 1, (run.own_s - looked.called_s) / len(looked.calls), run.own_s / len(looked.calls))
        for run, looked in zip(runs.near, runs.looked, strict=True)
    ]
    steps = [(run.streams - 1, run.outside_s / run.steps) for run in runs.near]
    return RouterCosts(*_line(steps), *_signed_line(layers))


def _far_costs(remote: Sequence[Observed]) -> RouterCosts:
    steps = [(run.streams - 1, run.outside_s / run.steps) for run in remote]
    layers = [(run.streams - 1, run.own_s / len(run.calls)) for run in remote]
    return RouterCosts(*_line(steps), *_line(layers))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Value at 0 and slope, neither below 0, that explain the medians of points with equal x best, relative to each."""
    start, slope = _signed_line([(x, y, y) for x, y in points])
    return max(0.0, start), max(0.0, slope)


def _signed_line(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The same, of any sign. points: x, y, and what an error is relative to."""
    values: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for x, y, scale in points:
        values[round(x, 1)].append((y, scale))
    y_N, scale_N = np.array([np.median(found, axis=0) for found in values.values()]).T
    columns_N2 = np.stack([np.ones(len(y_N)), np.array(list(values))], axis=1) / scale_N[:, None]
    (start, slope), *_ = np.linalg.lstsq(columns_N2, y_N / scale_N, rcond=None)
    return float(start), float(slope)


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
