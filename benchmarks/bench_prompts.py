"""What does a running stream notice of a long prompt that arrives, and what does the prompt pay for that?

One engine in process, contenders that differ in how a prompt is computed beside running streams, in turns:
- `whole`: its chunks join the step of the streams (`BatchLimits.is_paced` off);
- `paced`: a pass of its own that pauses (`router/pace.py`), as `serve` does it;
- `small`: chunks that join the step, of so few rows that a step takes about as long as with `paced`.

Of each round: the gaps between a stream's tokens while the prompt is computed, in steps of the same streams just before
it (median); the time from the prompt's arrival to its first token, and the tokens that the streams got meanwhile. One
round is not counted. Beside these the prompt's time with nobody else there, in full chunks.

Usage: python -m benchmarks.bench_prompts [--store NAME] [--streams N] [--prompt N] [--rounds N] [--keep]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.report import finish, spread
from experts.store import ExpertStore
from gateway.stores.source import resolve_store
from router.batcher import BatchLimits
from router.engine import Engine
from router.loading import EngineOptions, load_engine
from router.request import GenerationRequest, SamplingParams

STREAM_PROMPT_TOKENS = 32
STEPS_BEFORE = 24
GOAL_STEPS = 3.0


@dataclass
class Round:
    """One arrival of the prompt."""

    gaps: list[float]
    """Of the streams, in their steps before it."""
    prompt_s: float
    stream_tokens: int


class Bench:
    """An engine whose limits change between rounds."""

    def __init__(self, engine: Engine, vocab_size: int, num_streams: int, num_prompt: int) -> None:
        self._engine, self._vocab_size = engine, vocab_size
        self._num_streams, self._num_prompt = num_streams, num_prompt
        self._random = np.random.default_rng(7)
        self._count = 0

    def submit(self, num_prompt: int, max_tokens: int) -> str:
        self._count += 1
        prompt = self._random.integers(3, self._vocab_size, num_prompt).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self._engine.submit(GenerationRequest(f"r{self._count}", tuple(prompt), sampling))
        return f"r{self._count}"

    def arrive(self, limits: BatchLimits, small_rows: int = 0) -> Round:
        """small_rows: rows of the prompt in each step of the streams, where not 0."""
        engine = self._engine
        engine.limits = replace(limits, is_paced=True)
        length = engine.max_tokens_per_sequence - STREAM_PROMPT_TOKENS
        streams = [self.submit(STREAM_PROMPT_TOKENS, length) for _ in range(self._num_streams)]
        started: set[str] = set()
        while len(started) < self._num_streams:
            started |= {event.request_id for event in engine.step()}
        usual = statistics.median(self._step_s() for _ in range(STEPS_BEFORE))
        engine.limits = limits
        if small_rows:
            engine.limits = replace(limits, max_batch_tokens=self._num_streams + small_rows)
        prompt, began = self.submit(self._num_prompt, 1), perf_counter()
        gaps, num_tokens, is_done = [], 0, False
        while not is_done:
            before = perf_counter()
            events = engine.step()
            gaps.append((perf_counter() - before) / usual)
            is_done = any(event.request_id == prompt for event in events)
            num_tokens += sum(event.request_id != prompt for event in events)
        prompt_s = perf_counter() - began
        for name in streams:
            engine.cancel(name)
        return Round(gaps, prompt_s, num_tokens)

    def alone_s(self, limits: BatchLimits) -> float:
        self._engine.limits = limits
        self.submit(self._num_prompt, 1)
        began = perf_counter()
        while self._engine.has_work:
            self._engine.step()
        return perf_counter() - began

    def _step_s(self) -> float:
        began = perf_counter()
        self._engine.step()
        return perf_counter() - began


def summarise(rounds: list[Round], alone_s: list[float]) -> dict[str, Any]:
    """Of all rounds of one contender. A gap's percentile is over all gaps of all rounds."""
    gaps = sorted(gap for found in rounds for gap in found.gaps)
    return {
        "longest_gap_steps": spread([max(found.gaps) for found in rounds]),
        "p99_gap_steps": gaps[int(0.99 * (len(gaps) - 1))],
        "median_gap_steps": statistics.median(gaps),
        "prompt_s": spread([found.prompt_s for found in rounds]),
        "prompt_to_alone": spread([f.prompt_s / alone for f, alone in zip(rounds, alone_s, strict=True)]),
        "stream_tokens": spread([float(found.stream_tokens) for found in rounds]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="stories", help="a store, a checkpoint, or a bundled model's name")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens; less where the context is shorter")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones; at least 2")
    parser.add_argument(
        "--small-rows", type=int, default=12, help="of the contender `small`; 0 leaves it out"
    )
    parser.add_argument("--suffix", default="", help="of the kept result's name")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    store = ExpertStore.open(resolve_store(options.store, announce=print))
    limits = BatchLimits(max_running=options.streams + 1, admission_reserve=0)
    loaded = load_engine(store, EngineOptions(limits=limits))
    loaded.worker.load_all()
    num_prompt = min(options.prompt, loaded.engine.max_tokens_per_sequence - 1)
    bench = Bench(loaded.engine, loaded.config.vocab_size, options.streams, num_prompt)
    unpaced = replace(limits, is_paced=False)
    ways = {"whole": unpaced, "paced": limits} | ({"small": unpaced} if options.small_rows else {})
    found: dict[str, list[Round]] = {way: [] for way in ways}
    alone: list[float] = []
    for number in range(options.rounds + 1):
        alone_s = bench.alone_s(limits)
        order = list(ways) if number % 2 else list(ways)[::-1]
        for way in order:
            arrived = bench.arrive(ways[way], options.small_rows if way == "small" else 0)
            if number:
                found[way].append(arrived)
        if number:
            alone.append(alone_s)
    results: dict[str, Any] = {way: summarise(rounds, alone) for way, rounds in found.items()}
    results["alone_s"] = spread(alone)
    for way in ways:
        result = results[way]
        print(
            f"{way}: longest gap {result['longest_gap_steps']['median']:.1f} steps "
            f"({result['longest_gap_steps']['p5']:.1f} to {result['longest_gap_steps']['p95']:.1f}; goal "
            f"{GOAL_STEPS}), p99 {result['p99_gap_steps']:.1f}, median {result['median_gap_steps']:.1f}; prompt "
            f"{result['prompt_s']['median']:.2f} s, {result['prompt_to_alone']['median']:.2f} of alone; "
            f"{result['stream_tokens']['median']:.0f} tokens meanwhile"
        )
    config = {key: value for key, value in vars(options).items() if key not in ("keep", "suffix")}
    config |= {"prompt": num_prompt, "goal_steps": GOAL_STEPS}
    finish("bench_prompts" + options.suffix, config, results, is_kept=options.keep)
    loaded.close()


if __name__ == "__main__":
    main()
