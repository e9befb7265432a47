"""What does finding a common beginning save, and what does looking for it cost where there is none?

One engine in process, with and without the prefix cache, in turns that alternate within every round:
- `second turn`: a conversation's first turn (its prompt and an answer, 1,000 tokens together), then the second, whose
  prompt is all of that and some new tokens. The time to the second turn's first token.
- `nothing in common`: a batch of requests with random prompts, one after the other as room allows. The time of the
  whole batch, in which every block is hashed, kept, and in the end evicted.

Usage: python -m benchmarks.bench_prefix [--store NAME] [--history N] [--rounds N] [--keep]
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.report import finish, spread
from experts.store import ExpertStore
from gateway.stores.source import resolve_store
from router.batcher import BatchLimits
from router.engine import Engine
from router.loading import EngineOptions, load_engine
from router.prefix_keys import PrefixScope
from router.request import GenerationRequest, SamplingParams

ANSWER_TOKENS = 64
NEW_TOKENS = 32
BATCH, BATCH_PROMPT, BATCH_ANSWER = 24, 192, 16


class Bench:
    """An engine whose prefix cache is switched on and off."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        assert engine.kv.scope is not None, "this model shares no prefixes"
        self._engine, self._vocab_size = engine, vocab_size
        self._scope: PrefixScope = engine.kv.scope
        self._random = np.random.default_rng(3)
        self._count = 0

    def second_turn(self, history: int, *, is_cached: bool) -> tuple[float, int]:
        """Seconds to the second turn's first token, and how many of its tokens were found."""
        self._switch(is_cached)
        first = self._prompt(history - ANSWER_TOKENS)
        answer = self._run(first, ANSWER_TOKENS)
        second = (*first, *answer, *self._prompt(NEW_TOKENS))
        before = self._engine.kv.num_hit_positions
        began = perf_counter()
        self._run(second, 1)
        return perf_counter() - began, self._engine.kv.num_hit_positions - before

    def nothing_in_common(self, *, is_cached: bool) -> float:
        self._switch(is_cached)
        prompts = [self._prompt(BATCH_PROMPT) for _ in range(BATCH)]
        began = perf_counter()
        for prompt in prompts:
            self._submit(prompt, BATCH_ANSWER)
        while self._engine.has_work:
            self._engine.step()
        return perf_counter() - began

    def _switch(self, is_cached: bool) -> None:
        self._engine.kv.scope = self._scope if is_cached else None
        self._engine.allocator.forget_prefixes()

    def _prompt(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.integers(3, self._vocab_size, length).tolist())

    def _submit(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        self._count += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self._engine.submit(GenerationRequest(f"r{self._count}", prompt, sampling))

    def _run(self, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        self._submit(prompt, max_tokens)
        tokens: list[int] = []
        while self._engine.has_work:
            tokens.extend(token for event in self._engine.step() for token in event.token_ids)
        return tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="stories", help="a store, a checkpoint, or a bundled model's name")
    parser.add_argument("--history", type=int, default=1000, help="tokens of the first turn, answer included")
    parser.add_argument("--rounds", type=int, default=7, help="counted ones; at least 2")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    store = ExpertStore.open(resolve_store(options.store, announce=print))
    # Few enough blocks that the batch evicts.
    limits = BatchLimits(max_running=8)
    loaded = load_engine(store, EngineOptions(limits=limits, kv_budget_bytes=6 << 20))
    loaded.worker.load_all()
    bench = Bench(loaded.engine, loaded.config.vocab_size)
    turns: dict[bool, list[float]] = {True: [], False: []}
    batches: dict[bool, list[float]] = {True: [], False: []}
    num_found = 0
    for number in range(options.rounds + 1):
        for is_cached in (True, False) if number % 2 else (False, True):
            seconds, found = bench.second_turn(options.history, is_cached=is_cached)
            batch_s = bench.nothing_in_common(is_cached=is_cached)
            if number:
                turns[is_cached].append(seconds)
                batches[is_cached].append(batch_s)
                num_found = max(num_found, found)
    results: dict[str, Any] = {
        "second_turn": {
            "found_tokens": num_found,
            "with_s": spread(turns[True]),
            "without_s": spread(turns[False]),
            "ratio": spread([a / b for a, b in zip(turns[True], turns[False], strict=True)]),
        },
        "nothing_in_common": {
            "evicted_blocks": loaded.engine.allocator.prefixes.num_evicted,
            "with_s": spread(batches[True]),
            "without_s": spread(batches[False]),
            "ratio": spread([a / b for a, b in zip(batches[True], batches[False], strict=True)]),
        },
    }
    for name, found_of in results.items():
        ratio = found_of["ratio"]
        print(
            f"{name}: {found_of['with_s']['median'] * 1e3:.0f} ms with, "
            f"{found_of['without_s']['median'] * 1e3:.0f} ms without; ratio {ratio['median']:.3f} "
            f"({ratio['p5']:.3f} to {ratio['p95']:.3f})"
        )
    config = {key: value for key, value in vars(options).items() if key != "keep"}
    config |= {"answer": ANSWER_TOKENS, "new": NEW_TOKENS, "batch": [BATCH, BATCH_PROMPT, BATCH_ANSWER]}
    finish("bench_prefix", config, results, is_kept=options.keep)
    loaded.close()


if __name__ == "__main__":
    main()
