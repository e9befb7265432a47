"""Does kept trust help a cache after a restart, on the same topic and on another?

The bundled model reads half of text ONE while trust is learned. Then its cache is empty, as after a restart, and reads
what comes next: the other half of ONE, or text TWO. Routing is recorded and replayed, token after token and layer after
layer, against a cache that all layers share; no weights are read and no time is measured. Contenders: the eviction
`trust` with the ledger that was kept, with a fresh one (0.5 for everybody), and with one learned from the very text
that follows (which nobody can have); `lru`; `lfu` as it is, and with its counts kept as well; Belady's optimum. Trust
stays as it was at the restart, so that only what was kept makes the difference.

Usage: python -m benchmarks.bench_trust_restart [ONE TWO] [--tokens N] [--keep]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench_eviction import SHARES, STORIES, RoutingRecorder, requests, run
from benchmarks.report import TEXTS, finish
from experts.eviction import LFU_HALF_LIFE, FrequencyWorth, Worth, make_worth
from experts.replay import Trace, replay, replay_belady
from experts.store import ExpertStore
from experts.trust_book import TrustBook
from extraction.extract import extract
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest
from router.trust_collector import TrustCollector
from router.trust_session import trust_identity

EARLY_TOKENS = 500
"""Hits are counted over so many tokens after the restart as well: later, any cache has learned by itself."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=Path, nargs="?", default=TEXTS / "brown-fairy-book.txt")
    parser.add_argument("two", type=Path, nargs="?", default=TEXTS / "wikitext-2-test.txt")
    parser.add_argument("--tokens", type=int, default=10_000, help="of each half, and of TWO")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        extract(STORIES, root)
        loaded = load_engine(ExpertStore.open(root), EngineOptions())
        tokenizer = TextTokenizer.from_folder(root)
        whole = requests(tokenizer, [options.one], 2 * options.tokens)
        before, same = whole[: len(whole) // 2], whole[len(whole) // 2 :]
        parts = {"before": before, "same": same, "other": requests(tokenizer, [options.two], options.tokens)}
        seen = {name: _read(loaded, part) for name, part in parts.items()}
        num_experts = len(loaded.store.expert_keys(loaded.store.served.name))
        loaded.close()
    results = {
        f"{topic} topic, {share:.1%} resident": _compare(
            seen["before"], seen[topic], int(num_experts * share)
        )
        for topic in ("same", "other")
        for share in SHARES
    }
    for name, rates in results.items():
        shown = ", ".join(f"{who} {early:.1%} / {late:.1%}" for who, (early, late) in rates.items())
        print(f"{name}: {shown}")
    config = {"model": STORIES.name, "texts": [options.one.name, options.two.name], "tokens": options.tokens}
    finish(
        "bench_trust_restart",
        config | {"early_tokens": EARLY_TOKENS, "lfu_half_life": LFU_HALF_LIFE},
        {"hit_rates_early_and_all": results},
        is_kept=options.keep,
    )


Seen = tuple[TrustBook, Trace, list[int]]
"""What was learned from a part by itself, its calls, and the step of each."""


def _read(loaded: LoadedEngine, part: Sequence[GenerationRequest]) -> Seen:
    identity = trust_identity(loaded.store)
    book = TrustBook(identity.empty_table())
    collector, recorder = TrustCollector(book, loaded.config.hidden_size), RoutingRecorder()
    loaded.engine.watchers, loaded.engine.probe = (collector, recorder), collector
    run(loaded.engine, part)
    collector.flush()
    trace, steps = recorder.trace(identity.component)
    return book, trace, steps


def _compare(before: Seen, after: Seen, capacity: int) -> dict[str, tuple[float, float]]:
    """Contender -> hit rate of the first tokens, and of all."""
    book, earlier_trace, earlier_steps = before
    own_book, trace, steps = after
    num_early = sum(step <= EARLY_TOKENS for step in steps)

    def kept_counts() -> Worth:
        worth = FrequencyWorth(LFU_HALF_LIFE)
        for keys, now in zip(earlier_trace, earlier_steps, strict=True):
            for key in keys:
                worth.of_use(key, 1, now - earlier_steps[-1])
        return worth

    contenders: dict[str, Callable[[], Worth]] = {
        "trust kept": lambda: make_worth("trust", book.score),
        "trust fresh": lambda: make_worth("trust"),
        "trust of what follows": lambda: make_worth("trust", own_book.score),
        "lru": lambda: make_worth("lru"),
        "lfu": lambda: make_worth("lfu"),
        "lfu with counts kept": kept_counts,
    }
    rates = {}
    for name, make in contenders.items():
        early = replay(trace[:num_early], steps[:num_early], capacity, make()).hit_rate
        rates[name] = (round(early, 4), round(replay(trace, steps, capacity, make()).hit_rate, 4))
    early = replay_belady(trace[:num_early], capacity).hit_rate
    rates["belady"] = (round(early, 4), round(replay_belady(trace, capacity).hit_rate, 4))
    return rates


if __name__ == "__main__":
    main()
