"""Does the simulator say what really happens?

Measures the seconds that it goes by (`benchmarks.simulator_costs`), replays the routing of a real run through it, and
compares the tokens/s that it foretells with those of the same prompts on engines with 1, 2 and 4 local actors, with 1
and 16 streams. The costs come from single calls and from an engine without actors; no run that is foretold is used.

Usage: python -m benchmarks.bench_simulator [--store NAME] [--rounds N] [--tokens N] [--keep]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.bench_cluster import ACTORS, STREAMS, Contender, contender, measure_speed, prompts_for
from benchmarks.report import finish
from benchmarks.simulator_costs import (
    PAUSE_S,
    SHAPES,
    RoutingRecorder,
    fit_hop,
    fit_worker,
    measure_router,
    time_calls,
)
from cluster.placement import split_experts
from cluster.plan import ActorPlan, ExpertGroup, ServicePlan
from cluster.resources import plan_threads
from cluster.simulated_worker import Costs, ModelShape
from cluster.simulator import Simulation
from cluster.topology import NodeFacts, Topology
from experts.numerics import num_cores
from gateway.store_source import resolve_store

GOAL = 0.2
"""Most that a forecast may be off, relative to the measurement."""


def measure_costs(here: Contender, one: Contender, two: Contender, num_rounds: int) -> tuple[Costs, float]:
    """And the round trip. here, one, two: an engine without actors, and engines with one and two."""
    router = measure_router(here, num_tokens=64)
    (few_s, few_layer_s), (many_s, many_layer_s) = router[1], router[16]
    here_s = time_calls(here.loaded, here.loaded.directory.run, num_rounds, 0.0)
    call_s, expert_s, row_s = fit_worker(here_s)
    one_s = time_calls(one.loaded, one.loaded.directory.run, num_rounds, PAUSE_S)
    two_s = time_calls(two.loaded, two.loaded.directory.run, num_rounds, PAUSE_S)
    halves_s = np.array([call_s + (e - e // 2) * (expert_s + (rows - 1) * row_s) for e, rows in SHAPES])
    both = np.array([experts > 1 for experts, _ in SHAPES])
    hop = fit_hop(here_s, one_s, two_s[both], halves_s[both])
    threads = plan_threads(num_cores(), 1, here.loaded.config.expert_elements)
    costs = Costs(
        step_s=few_s,
        row_s=(many_s - few_s) / 15,
        layer_s=few_layer_s,
        layer_row_s=max(0.0, (many_layer_s - few_layer_s) / 15),
        call_s=call_s,
        expert_s=expert_s,
        expert_row_s=row_s,
        message_s=hop.message_s,
        actor_factor=hop.actor_factor,
        disk_bytes_s=float("inf"),
        threads=threads.expert_actor,
    )
    return costs, hop.round_trip_s


def record_routing(here: Contender, streams: int, num_tokens: int) -> list[np.ndarray]:
    recorder = RoutingRecorder(sorted(here.loaded.config.moe_layers))
    here.loaded.engine.watchers = (recorder,)
    here.decode(prompts_for(here, streams), num_tokens)
    here.loaded.engine.watchers = ()
    return recorder.decoded(streams)


def foretell(
    here: Contender, num_actors: int, routing: Sequence[np.ndarray], costs: Costs, round_trip_s: float
) -> float:
    """Tokens/s of a simulated service with all actors on this machine."""
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
    return simulation.report.tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="stories", help="a store, a checkpoint, or a bundled model's name")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones; at least 2")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream and round")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    root = resolve_store(options.store, announce=print)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        contenders = [stack.enter_context(contender(root, number)) for number in (0, *ACTORS)]
        here = contenders[0]
        costs, round_trip_s = measure_costs(here, contenders[1], contenders[2], 10 * options.rounds)
        results["costs"] = asdict(costs) | {"round_trip_s": round_trip_s}
        print(", ".join(f"{name} {value:.3g}" for name, value in results["costs"].items()))
        for streams in STREAMS:
            routing = record_routing(here, streams, options.tokens)
            speed = measure_speed(contenders, streams, options.rounds, options.tokens)
            for number, served in zip((0, *ACTORS), contenders, strict=True):
                measured = speed[served.name]["tokens_per_s"]
                foretold = foretell(here, number, routing, costs, round_trip_s)
                error = foretold / measured["median"] - 1.0
                results[f"{streams} streams, {served.name}"] = {
                    "foretold": foretold,
                    "measured": measured,
                    "error": error,
                }
                print(
                    f"{streams:2} streams, {served.name:10}: {foretold:7.1f} tokens/s foretold, "
                    f"{measured['median']:7.1f} measured, {100 * error:+.0f}%; goal within {100 * GOAL:.0f}%"
                )
    config = {key: value for key, value in vars(options).items() if key != "keep"}
    finish("bench_simulator", config | {"goal": GOAL}, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
