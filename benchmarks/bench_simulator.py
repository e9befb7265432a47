"""Does the simulator say what really happens?

Measures the seconds that it goes by (`benchmarks.simulator_costs`) on runs with 2, 6 and 24 streams without actors,
with one and with two. Replays the routing of other prompts through it, and compares the tokens/s that it foretells with
those of the same prompts on engines with 0, 1, 2 and 4 local actors, with 1 and 16 streams. Both kinds of runs take
turns, so that they meet the same machine.

Usage: python -m benchmarks.bench_simulator [--store NAME] [--rounds N] [--tokens N] [--keep]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks.bench_cluster import ACTORS, STREAMS, Contender, contender, prompts_for
from benchmarks.report import finish, spread
from benchmarks.simulator_costs import (
    FIRST_SEED,
    TOKENS,
    Runs,
    fit_costs,
    fit_overlap,
    foretell,
    observe_all,
    record_routing,
)
from benchmarks.simulator_costs import STREAMS as CALIBRATED
from gateway.stores.source import resolve_store

GOAL = 0.2
"""Most that a forecast may be off, relative to the measurement."""

Speeds = dict[tuple[int, str], list[float]]
"""Tokens/s by number of streams and contender."""


def measure(contenders: Sequence[Contender], num_rounds: int, num_tokens: int) -> tuple[list[Runs], Speeds]:
    """Costs and speeds in turn. One round is not counted."""
    rounds: list[Runs] = []
    speeds: Speeds = {(streams, served.name): [] for streams in STREAMS for served in contenders}
    for number in range(num_rounds + 1):
        runs = observe_all(contenders[0], contenders[1], contenders[2])
        turn = contenders if number % 2 else contenders[::-1]
        found = {
            (streams, served.name): served.decode(prompts_for(served, streams), num_tokens)
            for streams in STREAMS
            for served in turn
        }
        if number:
            rounds.append(runs)
            for key, speed in found.items():
                speeds[key].append(speed)
    return rounds, speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="stories", help="a store, a checkpoint, or a bundled model's name")
    parser.add_argument("--rounds", type=int, default=6, help="counted ones; at least 2")
    parser.add_argument("--tokens", type=int, default=48, help="of each stream and foretold run")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    root = resolve_store(options.store, announce=print)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        contenders = [stack.enter_context(contender(root, number)) for number in (0, *ACTORS)]
        here = contenders[0]
        known = {streams: record_routing(here, streams, TOKENS, FIRST_SEED) for streams in CALIBRATED}
        asked = {streams: record_routing(here, streams, options.tokens) for streams in STREAMS}
        rounds, speeds = measure(contenders, options.rounds, options.tokens)
        costs, round_trip_s = fit_costs(rounds, here)
        costs = fit_overlap(here, costs, round_trip_s, rounds, known)
        results["num_layers"] = len(here.loaded.config.moe_layers)
        results["costs"] = asdict(costs) | {"round_trip_s": round_trip_s}
        print(costs, f"round_trip_s={round_trip_s:.3g}")
        for streams in STREAMS:
            for number, served in zip((0, *ACTORS), contenders, strict=True):
                measured = spread(speeds[streams, served.name])
                foretold = foretell(here, number, asked[streams], costs, round_trip_s).tokens_per_s
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
    finish(
        "bench_simulator",
        config | {"goal": GOAL, "calibrated_streams": CALIBRATED},
        results,
        is_kept=options.keep,
    )


if __name__ == "__main__":
    main()
