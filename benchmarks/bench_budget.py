"""What does a token cost when only some of the experts fit? Under a memory limit that the kernel enforces.

A slice (2 layers at Qwen3-30B-A3B's width, `benchmarks.make_slice`) computes one text token by token:
- the engine with room for 100, 50, 25 and 12.5% of the experts, each against max(compute, missed bytes / disk
  bandwidth): compute is the step at 100%, the bandwidth that of parallel reads of the same records past the page
  cache;
- the same computation over a plain mmap of the records, and `transformers` with Accelerate's disk offload, both
  with the memory of 25%;
- one layer, one token, against the same bytes through bare `F.linear` calls, and what an expert in host memory
  costs beside its arithmetic (`benchmarks.one_layer`).
Every turn is a process of its own in a memory group of its own, page cache included, and starts with nothing of
the files cached; contenders alternate round by round, with bandwidth measured in each. The head is timed apart.

Usage: python -m benchmarks.bench_budget [--rounds N] [--tokens N] [--near-uniform] [--folder DIR] [--keep]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.budget_contender import Report, Task
from benchmarks.disk_rate import disk_bytes_per_s, forget_files
from benchmarks.make_slice import NEAR_UNIFORM, DiskTooSmall, SliceSpec, write_slice
from benchmarks.memory_cap import memory_cap
from benchmarks.one_layer import measure_layer
from benchmarks.published import PUBLISHED
from benchmarks.report import finish, spread
from experts.store import ExpertStore
from extraction.extract import extract

RESIDENCIES = (1.0, 0.5, 0.25, 0.125)
PEER_RESIDENCY = 0.25
SLACK_BYTES = 160 << 20
"""Above an empty engine and its budget: what a load and a step hold for a moment."""
PEER_TOKENS = 8
TURN_TIMEOUT_S = 300
VOCABULARY = 8192
"""The head is timed apart, and its published size would be most of what is read in two layers."""
LAYER_STEPS = 200
GOALS = {"of_ideal": 0.8, "mapped": 2.6, "offload": 10.0, "layer": 1.15}


class TurnFailed(Exception):
    """A contender's process ended with an error, or was killed at its limit."""

    def __init__(self, name: str, returncode: int, output: str) -> None:
        super().__init__(name, returncode, output)
        self.name, self.returncode, self.output = name, returncode, output

    def __str__(self) -> str:
        return f"{self.name} ended with {self.returncode}: {self.output}"


@dataclass(frozen=True)
class Turn:
    """One contender's process in one round."""

    report: Report
    limit_bytes: int
    peak_bytes: int | None
    unlimited: str | None
    """Why no limit was enforced; None where it was."""

    @property
    def step_s(self) -> float:
        return mean(self.report.step_s)

    @property
    def bytes_read(self) -> float:
        """Of experts, per token."""
        return self.report.bytes_read / len(self.report.step_s)


@dataclass(frozen=True)
class Round:
    """Every contender's turn, and the disk's rate between them."""

    turns: dict[str, Turn]
    disk_bytes_per_s: float

    def of_ideal(self, residency: float) -> float:
        """The speed of a step relative to max(compute, missed bytes / bandwidth)."""
        turn = self.turns[_name(residency)]
        compute_s = self.turns[_name(1.0)].step_s
        return max(compute_s, turn.bytes_read / self.disk_bytes_per_s) / turn.step_s


class Bench:
    """A slice, its store, and how turns are run on them."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.checkpoint, self.store_root = root / "checkpoint", root / "store"
        self.options = options
        skew, locality = NEAR_UNIFORM if options.near_uniform else (0.75, 0.3)
        config = dict(PUBLISHED["qwen3_moe"]) | {
            "num_hidden_layers": options.layers,
            "vocab_size": VOCABULARY,
            "eos_token_id": VOCABULARY - 1,
        }
        write_slice(SliceSpec(config, skew, locality, is_stacked=True), self.checkpoint)
        extract(self.checkpoint, self.store_root)
        self.store = ExpertStore.open(self.store_root)
        self.expert_bytes = sum(self.store.record(key).nbytes for key in self.store.expert_keys())
        # Generous, so that what the empty engine itself needs is seen.
        self.empty_bytes = self._turn("empty", None, 0, 1 << 36).report.anonymous_bytes

    def round(self, number: int) -> Round:
        contenders: list[tuple[str, str, float, int]] = [
            (_name(share), "budget", share, self.options.tokens) for share in RESIDENCIES
        ]
        contenders.append(("mapped", "mapped", PEER_RESIDENCY, self.options.tokens))
        if not self.options.without_transformers:
            contenders.append(("offload", "offload", PEER_RESIDENCY, PEER_TOKENS))
        turns = {}
        rate = disk_bytes_per_s(self.store, 64, number)
        for name, kind, share, tokens in contenders if number % 2 else contenders[::-1]:
            budget = int(self.expert_bytes * share)
            turns[name] = self._turn(kind, budget, tokens, self.empty_bytes + budget + SLACK_BYTES)
            print(f"round {number}: {name:8} {1 / turns[name].step_s:7.2f} tokens/s", flush=True)
        return Round(turns, (rate + disk_bytes_per_s(self.store, 64, -number - 1)) / 2)

    def _turn(self, kind: str, budget: int | None, tokens: int, limit: int) -> Turn:
        """Raises TurnFailed."""
        warmup = tokens // 2
        task = Task(kind, str(self.store_root), str(self.checkpoint), budget, warmup, tokens, seed=3)
        return run_turn(task, limit)


def run_turn(task: Task, limit: int) -> Turn:
    """One contender in a process and a memory group of its own, with no file of its cached. Raises TurnFailed."""
    forget_files(_weights(Path(task.checkpoint), Path(task.store)))
    command = [sys.executable, "-m", "benchmarks.budget_contender", json.dumps(asdict(task))]
    with memory_cap(limit, "bench-budget") as cap:
        done = subprocess.run(
            command,
            preexec_fn=cap.enter,
            capture_output=True,
            text=True,
            timeout=TURN_TIMEOUT_S,
            check=False,
        )
        peak = cap.peak_bytes()
    if done.returncode:
        raise TurnFailed(task.kind, done.returncode, done.stderr[-1000:] or f"limit of {limit} bytes")
    report = Report(**json.loads(done.stdout.splitlines()[-1]))
    return Turn(report, limit, peak, cap.reason)


def _name(residency: float) -> str:
    return f"{residency:.1%}"


def _weights(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from folder.rglob("*.safetensors")


def summarise(rounds: list[Round]) -> dict[str, Any]:
    """Medians and spread over the rounds, each ratio taken inside one round."""
    names = list(rounds[0].turns)
    peers = {
        name: spread([r.turns[name].step_s / r.turns[_name(PEER_RESIDENCY)].step_s for r in rounds])
        for name in ("mapped", "offload")
        if name in names
    }
    bits = {r.turns[name].report.hidden_sha256 for r in rounds for name in names if name != "offload"}
    return {
        "tokens_per_s": {name: spread([1 / r.turns[name].step_s for r in rounds]) for name in names},
        "of_ideal": {_name(share): spread([r.of_ideal(share) for r in rounds]) for share in RESIDENCIES},
        "slower_than_budget": peers,
        "head_ms": {
            name: median(1e3 * s for r in rounds for s in r.turns[name].report.head_s) for name in names
        },
        "miss_ratio": {
            name: turn.report.misses / (turn.report.misses + turn.report.hits)
            for name, turn in rounds[-1].turns.items()
            if turn.report.hits
        },
        "mb_read_per_token": {
            name: turn.bytes_read / 1e6 for name, turn in rounds[-1].turns.items() if turn.report.hits
        },
        "disk_gb_per_s": spread([r.disk_bytes_per_s / 1e9 for r in rounds]),
        "memory_bytes": {
            name: {
                "limit": turn.limit_bytes,
                "peak_with_page_cache": turn.peak_bytes,
                "anonymous": turn.report.anonymous_bytes,
            }
            for name, turn in rounds[-1].turns.items()
        },
        "is_same_bits": len(bits) == 1,
        "unlimited": next(iter(rounds[0].turns.values())).unlimited,
    }


def _layer(store: ExpertStore) -> dict[str, Any]:
    samples = measure_layer(store, LAYER_STEPS)
    ratios = [block / bare for block, bare in zip(samples.block_ms, samples.bare_ms, strict=True)]
    return {
        "block_ms": spread(samples.block_ms),
        "bare_linear_ms": spread(samples.bare_ms),
        "ratio": spread(ratios),
        "moved_experts": samples.moved_experts,
        "grown_bytes": samples.grown_bytes,
        "expert_bytes": samples.expert_bytes,
        "is_copied": samples.moved_experts > 0 or samples.grown_bytes >= samples.expert_bytes,
    }


def _show(results: dict[str, Any]) -> None:
    if results["unlimited"]:
        print(f"no memory limit was enforced: {results['unlimited']}; peers may use the whole page cache")
    for name, rate in results["tokens_per_s"].items():
        line = f"{name:8} {rate['median']:7.2f} tokens/s"
        if name in results["of_ideal"]:
            line += f", {results['of_ideal'][name]['median']:.2f} of ideal; goal {GOALS['of_ideal']}"
        if name in results["slower_than_budget"]:
            ratio = results["slower_than_budget"][name]["median"]
            line += f", {ratio:.2f} times slower than {_name(PEER_RESIDENCY)}; goal {GOALS[name]}"
        print(line)
    layer = results["one_layer"]
    print(
        f"one layer, one token: {layer['block_ms']['median']:.2f} ms, {layer['ratio']['median']:.3f} of bare F.linear; "
        f"goal at most {GOALS['layer']}; experts copied: {layer['is_copied']}"
    )
    print(f"every budget and the mmap gave the same bits: {results['is_same_bits']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2, help="of 1.2 GB each, twice on disk")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--tokens", type=int, default=48, help="counted ones; half as many come first")
    parser.add_argument("--near-uniform", action="store_true", help="routing as hard as a cache can meet")
    parser.add_argument(
        "--without-transformers", action="store_true", help="where the extra bench is missing"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    if options.layers < 1 or options.rounds < 2 or options.tokens < 2:
        parser.error("at least 1 layer, 2 rounds and 2 tokens")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-budget-", dir=options.folder) as folder:
            bench = Bench(Path(folder), options)
            rounds = [bench.round(number) for number in range(options.rounds)]
            results = summarise(rounds) | {"one_layer": _layer(bench.store)}
            bench.store.close()
    except (DiskTooSmall, TurnFailed) as error:
        sys.exit(str(error))
    _show(results)
    config = {
        "family": "qwen3_moe",
        "layers": options.layers,
        "routing": "near uniform" if options.near_uniform else "skew 0.75, locality 0.3",
        "rounds": options.rounds,
        "tokens": options.tokens,
        "empty_engine_bytes": bench.empty_bytes,
        "expert_bytes": bench.expert_bytes,
        "slack_bytes": SLACK_BYTES,
        "goals": GOALS,
    }
    name = "bench_budget_near_uniform" if options.near_uniform else "bench_budget"
    finish(name, config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
