"""Hundreds of trials on running services, every one kept: `make chaos` runs it, docs/reliability.md has what came out.

Usage: python -m tests.chaos.kill_trials STORE OUT [--kills N] [--seed N] [--part I/N] [--seconds N]. OUT is JSON and
grows: a trial that is in it already is not run again. Exit code 1 where an answer was not the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.resources import LOCAL_ONLY, ray_environment

os.environ.update(ray_environment() | LOCAL_ONLY)  # before anything imports Ray
from tests.chaos.service_under_fire import service_under_fire
from tests.chaos.trials import KINDS, Range, Trial, plan_trials

SHARES: dict[tuple[str, int], int] = {
    ("actor killed", 2): 44,
    ("actor killed", 1): 30,
    ("actor killed in the middle of a frame", 2): 6,
    ("actor killed in the middle of a frame", 1): 6,
    ("actor killed, and its replacement at its start", 1): 4,
    ("actor killed, and its replacement while loading", 1): 4,
    ("actor killed, and its replacement when connected to", 1): 6,
    ("actor killed while it drains", 2): 8,
    ("actor hangs", 2): 8,
    ("actor hangs", 1): 4,
    ("connection cut", 2): 10,
    ("connection cut", 1): 10,
    ("router killed", 2): 20,
    ("router killed, and the others with it", 2): 6,
    ("router killed, and the supervisor with it", 2): 6,
    ("router hangs", 2): 3,
    ("supervisor killed", 2): 8,
    ("actor killed, and the supervisor that replaces it", 1): 8,
    ("node lost", 2): 4,
    ("node lost", 1): 6,
}
"""Kinds of trials and numbers of replicas, for 200 kills."""


MENDED_EACH = 3
"""After one of so many trials all is mended before the next, and timed; the others meet a service that is at it."""


def num_kills(kind: str) -> int:
    """Of processes, in a trial that goes as planned; a lost node is one."""
    if KINDS[kind].deed in ("stop", "cut"):
        return 0
    return 2 if KINDS[kind].killed_with else 1


def scaled(kills: int) -> dict[tuple[str, int], int]:
    """The shares for at least so many kills."""
    total = sum(count * num_kills(kind) for (kind, _), count in SHARES.items())
    return {pair: math.ceil(count * kills / total) for pair, count in SHARES.items()}


def summary(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each kind and number of replicas that happened: how many, how many were equal, and how long the reader
    waited."""
    pairs = sorted({(trial["num_replicas"], trial["kind"]) for trial in trials if trial["is_fired"]})
    return [_summary_of(kind, number, trials) for number, kind in pairs]


def _summary_of(kind: str, num_replicas: int, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_kind = [t for t in trials if (t["kind"], t["num_replicas"]) == (kind, num_replicas) and t["is_fired"]]
    stalls = sorted(trial["stall_s"] for trial in of_kind)
    mended = sorted(t["mended_after_s"] for t in of_kind if t["mended_after_s"] is not None)
    return {
        "kind": kind,
        "num_replicas": num_replicas,
        "trials": len(of_kind),
        "equal": sum(trial["is_equal"] for trial in of_kind),
        "answers": sum(trial["num_answers"] for trial in of_kind),
        "stall_s": _quantiles(stalls),
        "usual_gap_s": _quantiles(sorted(trial["usual_gap_s"] for trial in of_kind)),
        "mended_after_s": _quantiles(mended),
    }


def _quantiles(ordered: Sequence[float]) -> dict[str, float] | None:
    """By nearest rank."""
    if not ordered:
        return None
    ranks = {"median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(ordered[math.ceil(q * len(ordered)) - 1], 4) for name, q in ranks.items()}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A summary in Markdown. Times in milliseconds, but of mending in seconds."""
    lines = [
        "| what happened | actors a group | trials | the same | stall: median | p95 | longest | mended after: median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stalls = [f"{row['stall_s'][name] * 1e3:.0f} ms" for name in ("median", "p95", "max")]
        mended = row["mended_after_s"]
        cells = (row["kind"], row["num_replicas"], row["trials"], row["equal"], *stalls)
        cells = (*cells, f"{mended['median']:.1f} s" if mended else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _run(options: argparse.Namespace) -> int:
    """How many answers were not the same."""
    out, facts = options.out, {"seed": options.seed, "kills": options.kills}
    kept = json.loads(out.read_text()) if out.exists() else {**facts, "trials": []}
    if {key: kept[key] for key in facts} != facts:
        raise SystemExit(f"{out} is of seed {kept['seed']} and {kept['kills']} kills")
    part, num_parts = map(int, options.part.split("/"))
    done = {trial["number"] for trial in kept["trials"]}
    trials = [t for t in plan_trials(options.seed, scaled(options.kills)) if t.number % num_parts == part]
    trials = [trial for trial in trials if trial.number not in done]
    if trials:
        _carry_out(trials, options, kept)
    return sum(not trial["is_equal"] for trial in kept["trials"])


def _carry_out(trials: Sequence[Trial], options: argparse.Namespace, kept: dict[str, Any]) -> None:
    until_s = time.monotonic() + options.seconds
    with service_under_fire(options.store) as service:
        shots = Range(service)
        for index, trial in enumerate(trials):
            began_s = time.monotonic()
            if began_s >= until_s:
                break
            result = shots.run(trial, is_mended_after=index % MENDED_EACH == 0)
            verdict = ("equal" if result.is_equal else "DIFFERENT") if result.is_fired else "did not happen"
            print(
                f"{trial.number:4d} {trial.kind}, at: {trial.point}, {trial.num_replicas} of each: {verdict}, "
                f"stall {result.stall_s * 1e3:.0f} ms, {time.monotonic() - began_s:.1f} s",
                flush=True,
            )
            kept["trials"].append(result.as_json())
            kept |= {"summary": summary(kept["trials"]), "machine": _machine()}
            options.out.write_text(json.dumps(kept, indent=1) + "\n")


def _machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "ray": version("ray")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="I/N: of N parts only this one, from 0")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no trial after so many")
    options = parser.parse_args()
    num_different = _run(options)
    print(as_table(json.loads(options.out.read_text())["summary"]))
    print(f"{num_different} answers were not the same")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
