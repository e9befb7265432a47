"""What do long chunks of a prompt save where experts are read from disk, and what do they cost whoever comes meanwhile?

One engine in process over a slice of Qwen3-30B-A3B, at several budgets of its experts. In turns, at each budget:
- a prompt of 2,048 tokens alone, in chunks of 512, 1,024 and 2,048 rows: seconds to its first token, and bytes read;
- the same prompt when a short one comes after a quarter of that time: each one's seconds to its first token, with
  `whole` chunks, of 512 and of 2,048 rows, between which the short one must come (`BatchLimits.is_paced` off), and with
  chunks of 2,048 that it may overtake (`router/pace.py`), as `serve` does it.

One round is not counted. Reads go past the page cache where a budget is (docs/memory.md).

Usage: python -m benchmarks.bench_chunks [--folder DIR] [--budgets SHARE ...] [--rounds N] [--keep]
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.peer_models import PeerModel
from benchmarks.report import finish, spread
from experts.store import ExpertStore
from router.batcher import BatchLimits
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest, SamplingParams

CHUNKS = (512, 1024, 2048)
PROMPT, SHORT_PROMPT = 2048, 20
KV_BUDGET_BYTES = 1 << 28
ARRIVES_AFTER = 0.25
"""Of the prompt's time alone."""
LIMITS = BatchLimits(max_running=4, admission_reserve=8)
WAYS = {
    "whole 512": replace(LIMITS, max_batch_tokens=512, is_paced=False),
    "whole 2048": replace(LIMITS, max_batch_tokens=2048, is_paced=False),
    "overtaken 2048": replace(LIMITS, max_batch_tokens=2048),
}


@dataclass
class Bench:
    """One engine, whose limits change between turns."""

    loaded: LoadedEngine
    model: PeerModel
    count: int = 0

    def submit(self, length: int) -> str:
        self.count += 1
        (prompt,) = self.model.prompts(1, length, self.count)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        self.loaded.engine.submit(GenerationRequest(name := f"r{self.count}", tuple(prompt), sampling))
        return name

    def alone(self, rows: int) -> tuple[float, int]:
        """Seconds, and bytes read."""
        engine, read = self.loaded.engine, self.loaded.worker.stats.bytes_read
        engine.limits = replace(LIMITS, max_batch_tokens=rows, is_paced=False)
        self.submit(PROMPT)
        began = perf_counter()
        while engine.has_work:
            engine.step()
        return perf_counter() - began, self.loaded.worker.stats.bytes_read - read

    def beside(self, limits: BatchLimits, arrives_after_s: float) -> tuple[float, float]:
        """Seconds to the first token of the long prompt, and of the short one."""
        engine = self.loaded.engine
        engine.limits = limits
        first_s: dict[str, float] = {}
        began, short = perf_counter(), ""
        due = began + arrives_after_s
        engine.is_called = lambda: not short and perf_counter() >= due
        long = self.submit(PROMPT)
        while engine.has_work or not short:
            if not short and perf_counter() >= due:
                short = self.submit(SHORT_PROMPT)
            for event in engine.step():
                first_s[event.request_id] = perf_counter() - began
        return first_s[long], first_s[short] - arrives_after_s


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    alone: dict[int, list[tuple[float, int]]] = {rows: [] for rows in CHUNKS}
    beside: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        turn = 1 if number % 2 else -1
        for rows in CHUNKS[::turn]:
            found = bench.alone(rows)
            if number:
                alone[rows].append(found)
        arrives_after_s = ARRIVES_AFTER * found[0]
        for way in list(WAYS)[::turn]:
            pair = bench.beside(WAYS[way], arrives_after_s)
            if number:
                beside[way].append(pair)
    shortest = [seconds for seconds, _ in alone[CHUNKS[0]]]
    return {
        "alone": {
            str(rows): {
                "seconds": spread([seconds for seconds, _ in found]),
                "gigabytes_read": spread([nbytes / 1e9 for _, nbytes in found]),
                "times_as_fast": spread(
                    [s / seconds for s, (seconds, _) in zip(shortest, found, strict=True)]
                ),
            }
            for rows, found in alone.items()
        },
        "beside": {
            way: {
                "long_first_s": spread([long for long, _ in pairs]),
                "short_first_s": spread([short for _, short in pairs]),
            }
            for way, pairs in beside.items()
        },
    }


def _print(share: float, found: dict[str, Any]) -> None:
    for rows, result in found["alone"].items():
        print(
            f"{share:.0%} of experts, chunks of {rows:>4}: {result['seconds']['median']:5.2f} s, "
            f"{result['gigabytes_read']['median']:.1f} GB read, {result['times_as_fast']['median']:.2f} times as fast"
        )
    for way, result in found["beside"].items():
        print(
            f"{share:.0%} of experts, {way:>14}: long one's first token after "
            f"{result['long_first_s']['median']:.2f} s, short one's after {result['short_first_s']['median']:.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where models stay; default: a temporary one")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a tiny slice: does it run?")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="shares of all experts"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted ones; at least 2")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chunks-")))
        folder.mkdir(parents=True, exist_ok=True)
        model = PeerModel(folder, "qwen3_moe", options.layers, 4096, options.quick)
        store = ExpertStore.open(model.store("bf16"))
        stack.callback(store.close)
        keys = store.expert_keys(store.served.name)
        all_bytes = sum(store.record(key).nbytes for key in keys)
        for share in options.budgets:
            budget = None if share >= 1.0 else int(share * all_bytes)
            loaded = load_engine(
                store,
                EngineOptions(kv_budget_bytes=KV_BUDGET_BYTES, limits=LIMITS, expert_budget_bytes=budget),
            )
            loaded.worker.load_all()
            results[f"{share:g}"] = found = measure(Bench(loaded, model), options.rounds)
            _print(share, found)
            loaded.worker.close()
            del loaded
    config = {key: value for key, value in vars(options).items() if key not in ("keep", "folder")}
    finish("bench_chunks", config | {"prompt": PROMPT, "short": SHORT_PROMPT}, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
