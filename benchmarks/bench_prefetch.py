"""Does reading experts ahead, by the next layer's gate, pay?

- How good the guess is: on the bundled model and texts that it has not seen, token by token (deterministic): of the
  experts used, of those that a cache lacks, and what share of the reads would be useful.
- What it brings: tokens/s with and without, alternating, on a slice at Qwen3-30B-A3B's width under a budget, experts
  read past the page cache from the disk, each turn a process in a memory group of its own. The slice's layers change
  the hidden state little, so its guesses are better than a trained model's: what is measured is the most that there
  is to gain. `--accuracy-only` leaves this out.

Usage: python -m benchmarks.bench_prefetch [--rounds N] [--tokens N] [--share S ...] [--folder DIR] [--keep]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench_budget import SLACK_BYTES, VOCABULARY, Turn, TurnFailed, run_turn
from benchmarks.budget_contender import Task
from benchmarks.make_slice import DiskTooSmall, SliceSpec, write_slice
from benchmarks.prefetch_accuracy import accuracy, record_guesses
from benchmarks.published import PUBLISHED
from benchmarks.report import TEXTS, finish, spread
from experts.store import ExpertStore
from extraction.extract import extract

STORIES = Path(__file__).parent.parent / "models" / "stories-moe"
CONTEXT = 512
RESIDENCIES = (0.125, 0.25, 0.5)
SKEW, LOCALITY = 0.75, 0.3


def measure_accuracy(num_tokens: int) -> dict[str, Any]:
    """Text -> share of experts resident -> what `prefetch_accuracy.accuracy` finds."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-prefetch-") as folder:
        root = Path(folder) / "store"
        extract(STORIES, root)
        store = ExpertStore.open(root)
        num_experts = len(store.expert_keys(store.served.name))
        store.close()
        for text in sorted(TEXTS.glob("*.txt")):
            guesses = record_guesses(root, [text], num_tokens, CONTEXT)
            found[text.stem] = {
                f"{share:.1%}": {
                    name: round(value, 4) for name, value in accuracy(guesses, num_experts, share).items()
                }
                for share in RESIDENCIES
            }
            _show_accuracy(text.stem, found[text.stem])
    return found


def _show_accuracy(text: str, shares: dict[str, dict[str, float]]) -> None:
    for share, row in shares.items():
        print(
            f"{text}, {share} resident: guessed {row['of_uses']:.1%} of uses, {row['of_misses']:.1%} of misses; "
            f"{row['useful_reads']:.1%} of reads useful",
            flush=True,
        )


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Raises DiskTooSmall, TurnFailed."""
    with tempfile.TemporaryDirectory(prefix="bench-prefetch-", dir=options.folder) as folder:
        checkpoint, root = Path(folder) / "checkpoint", Path(folder) / "store"
        config = dict(PUBLISHED["qwen3_moe"]) | {
            "num_hidden_layers": options.layers,
            "vocab_size": VOCABULARY,
            "eos_token_id": VOCABULARY - 1,
        }
        write_slice(SliceSpec(config, SKEW, LOCALITY, is_stacked=True), checkpoint)
        extract(checkpoint, root)
        store = ExpertStore.open(root)
        expert_bytes = sum(store.record(key).nbytes for key in store.expert_keys())
        store.close()
        empty = run_turn(Task("empty", str(root), str(checkpoint), None, 0, 0, 3), 1 << 36)
        turns: dict[str, list[tuple[Turn, Turn]]] = {f"{share:.1%}": [] for share in options.share}
        for number in range(options.rounds):
            for share in options.share:
                budget = int(expert_bytes * share)
                limit = empty.report.anonymous_bytes + budget + SLACK_BYTES
                pair: dict[bool, Turn] = {}
                for prefetch in (False, True) if number % 2 else (True, False):
                    counted = options.tokens
                    task = Task(
                        "budget", str(root), str(checkpoint), budget, counted // 2, counted, 3, prefetch
                    )
                    pair[prefetch] = run_turn(task, limit)
                turns[f"{share:.1%}"].append((pair[False], pair[True]))
                print(
                    f"round {number}, {share:.1%}: {1 / pair[False].step_s:.2f} tokens/s, "
                    f"{1 / pair[True].step_s:.2f} with prefetch",
                    flush=True,
                )
        return {share: summarise(pairs) for share, pairs in turns.items()}


def summarise(pairs: list[tuple[Turn, Turn]]) -> dict[str, Any]:
    """Medians and spread over the rounds; the gain is taken inside each round."""
    plain, ahead = pairs[-1][0].report, pairs[-1][1].report
    return {
        "tokens_per_s": spread([1 / without.step_s for without, _ in pairs]),
        "tokens_per_s_prefetch": spread([1 / ahead.step_s for _, ahead in pairs]),
        "gain": spread([without.step_s / ahead.step_s for without, ahead in pairs]),
        "mb_read_per_token": pairs[-1][0].bytes_read / 1e6,
        "mb_read_per_token_prefetch": pairs[-1][1].bytes_read / 1e6,
        "misses_guessed": ahead.prefetched_used / ahead.misses if ahead.misses else 0.0,
        "reads_used": ahead.prefetched_used / ahead.prefetched if ahead.prefetched else 0.0,
        "is_same_bits": plain.hidden_sha256 == ahead.hidden_sha256,
        "unlimited": pairs[-1][0].unlimited,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=3, help="of 1.2 GB each, twice on disk; at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--tokens", type=int, default=48, help="counted ones; half as many come first")
    parser.add_argument("--share", type=float, nargs="+", default=[0.5, 0.25], help="of experts resident")
    parser.add_argument("--text-tokens", type=int, default=2048, help="of each text, for the accuracy")
    parser.add_argument("--accuracy-only", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    if options.layers < 2 or options.rounds < 2 or options.tokens < 2 or options.text_tokens < 2:
        parser.error("at least 2 layers, rounds and tokens")
    if not all(0.0 < share < 1.0 for share in options.share):
        parser.error("--share is between 0 and 1")
    results: dict[str, Any] = {"accuracy": measure_accuracy(options.text_tokens)}
    if not options.accuracy_only:
        try:
            results["speed"] = measure_speed(options)
        except (DiskTooSmall, TurnFailed) as error:
            sys.exit(str(error))
        for share, row in results["speed"].items():
            print(
                f"{share}: {row['gain']['median']:.3f} of the speed without; {row['misses_guessed']:.0%} of misses "
                f"guessed, {row['reads_used']:.0%} of reads used; same bits: {row['is_same_bits']}"
            )
    config = {
        "model": STORIES.name,
        "text_tokens": options.text_tokens,
        "context": CONTEXT,
        "slice": f"qwen3_moe, {options.layers} layers, skew {SKEW}, locality {LOCALITY}",
        "rounds": options.rounds,
        "tokens": options.tokens,
    }
    name = "bench_prefetch_accuracy" if options.accuracy_only else "bench_prefetch"
    finish(name, config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
