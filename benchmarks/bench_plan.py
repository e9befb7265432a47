"""How far is the forecast of `sage-moe plan` from a measured run?

Engines with all experts in one process and with 1, 2 and 4 local actors (`benchmarks.bench_cluster`, real data plane,
without Ray) decode the same prompts in turn, with 1 and 16 streams; the forecast is made for the same actors from the
model's configuration. Two forecasts: "typical" is the command's range, which knows nothing of this machine but its
cores, and was fitted on a machine of two; "known" goes by the seconds that `benchmarks.simulator_costs` measures on
other prompts, with other numbers of streams. Compared are tokens/s, and calls and bytes per token.

Usage: python -m benchmarks.bench_plan [--store NAME] [--rounds N] [--tokens N] [--keep]
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks.bench_cluster import ACTORS, STREAMS, Contender, contender, count_messages, measure_speed
from benchmarks.report import finish
from benchmarks.simulator_costs import measure_costs
from cluster.forecast import Forecast, forecast
from cluster.model_sizes import ModelSizes, measure_model
from cluster.placement import plan_local
from cluster.simulated_worker import Costs
from cluster.topology import NodeFacts, Topology
from experts.cores import num_cores
from gateway.planning.nodes import CPU_BYTES_S
from gateway.stores.source import resolve_store

CONTEXT = 96
"""Positions that the measured streams reach."""


def here(speed: float, round_trip_s: float) -> Topology:
    """This machine, with its memory's speed. Links within it take no time beside their round trip."""
    facts = NodeFacts(
        "here", "127.0.0.1", 1 << 40, num_cores(), speed, float("inf"), round_trip_s, has_store=True
    )
    return Topology((facts,), "here")


def foretell(
    model: ModelSizes, num_actors: int, num_streams: int, topology: Topology, costs: Costs | None
) -> Forecast:
    demand = model.uniform_demand()
    plan = plan_local(tuple(demand.sizes), num_actors)
    return forecast(plan, topology, demand, model, num_streams=num_streams, context=CONTEXT, costs=costs)


def compare(
    model: ModelSizes, num_actors: int, num_streams: int, measured: float, costs: Costs, round_trip_s: float
) -> dict[str, Any]:
    """Forecasts of tokens/s, and each one's high end as a share of what was measured."""
    typical = foretell(model, num_actors, num_streams, here(CPU_BYTES_S, 0.0), None)
    known = foretell(model, num_actors, num_streams, here(float("inf"), round_trip_s), costs)
    return {
        "measured": measured,
        "typical": typical.tokens_per_s,
        "typical_ratio": typical.tokens_per_s[1] / measured,
        "is_within": typical.tokens_per_s[0] <= measured <= typical.tokens_per_s[1],
        "known": known.tokens_per_s[1],
        "known_ratio": known.tokens_per_s[1] / measured,
    }


def compare_traffic(
    model: ModelSizes, served: Contender, num_actors: int, num_tokens: int
) -> dict[str, float]:
    """Of one stream. Measured bytes are those of rows alone, the forecast's those of whole frames."""
    counted = count_messages(served, num_tokens)
    foretold = foretell(model, num_actors, 1, here(CPU_BYTES_S, 0.0), None).traffic
    calls = counted["messages_per_token"] / 2
    return {
        "calls": calls,
        "calls_ratio": foretold.messages / calls,
        "bytes": counted["kilobytes_per_token"] * 1e3,
        "bytes_ratio": foretold.bytes / (counted["kilobytes_per_token"] * 1e3),
    }


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
        loaded = contenders[0].loaded
        model = measure_model(loaded.store.manifest.config, loaded.dtype, loaded.store.quantised)
        in_process, one, two = contenders[:3]
        costs, round_trip_s = measure_costs(in_process, one, two, options.rounds)
        results["costs"] = asdict(costs) | {"round_trip_s": round_trip_s}
        for streams in STREAMS:
            speed = measure_speed(contenders, streams, options.rounds, options.tokens)
            for number, served in zip((0, *ACTORS), contenders, strict=True):
                measured = speed[served.name]["tokens_per_s"]["median"]
                result = compare(model, number, streams, measured, costs, round_trip_s)
                results[f"{streams} streams, {served.name}"] = result
                low, high = result["typical"]
                print(
                    f"{streams:2} streams, {served.name:10}: {measured:7.1f} tokens/s measured; typical {low:.1f} to "
                    f"{high:.1f}; with measured costs {result['known']:.1f}, {result['known_ratio']:.2f} of it"
                )
        for number, served in zip(ACTORS, contenders[1:], strict=True):
            traffic = compare_traffic(model, served, number, options.tokens)
            results[f"traffic, {served.name}"] = traffic
            print(f"{served.name:10}: {json.dumps(traffic)}")
    config = {key: value for key, value in vars(options).items() if key != "keep"}
    finish("bench_plan", config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
