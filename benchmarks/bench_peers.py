"""How fast are we beside what users would take instead, on the same weights, prompts and cores?

Contenders are `sage-moe` in this repository's engine (`torch`: without its own C products) and served over HTTP,
`transformers`, and llama.cpp. Each is a process with the same checkpoint in memory, in its own format; they take turns,
round by round, in alternating order, greedily, with the same prompts of the round. Parts:
- agree: do they compute the same model? Greedy tokens, and the likeliest tokens' log probabilities after a prompt;
- single: one stream: decode (tokens/s, gigabytes of weights a second), and prompts of 512 and 2,048 tokens;
- streams: 1, 4, 16, 64 prompts that arrive together: tokens/s and time to the first token.
Sets of contenders: bf16, quantised (int8 beside Q8_0, int4 beside Q4_0), served (in process beside HTTP).
Models: slices of published widths with a few layers and random weights (`benchmarks.make_slice`), and the bundled one.
`--vocab-size 4096` takes nearly all of the head away: the difference to the published one is the head. All contenders
of a run must fit into memory together, or the kernel drops the pages of those that map their files.

Usage: python -m benchmarks.bench_peers --model qwen3_moe --set bf16 --part single [--folder DIR] [--label X] [--keep]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.peer_models import BUNDLED, PeerModel
from benchmarks.peer_process import ContenderFailed, ContenderProcess, ContenderSpec
from benchmarks.peer_run import Generated
from benchmarks.published import PUBLISHED
from benchmarks.report import finish, spread
from experts.cores import num_cores

SETS: Mapping[str, tuple[str, ...]] = {
    "bf16": ("sage-moe", "sage-moe torch", "transformers", "llama.cpp bf16"),
    "quantised": ("sage-moe int8", "llama.cpp q8_0", "sage-moe int4", "llama.cpp q4_0"),
    "served": ("sage-moe", "sage-moe served"),
}
RATIOS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "bf16": (
        ("sage-moe", "transformers"),
        ("sage-moe", "llama.cpp bf16"),
        ("sage-moe", "sage-moe torch"),
    ),
    "quantised": (("sage-moe int8", "llama.cpp q8_0"), ("sage-moe int4", "llama.cpp q4_0")),
    "served": (("sage-moe served", "sage-moe"),),
}
"""Of speeds, round by round: the first over the second."""
DECODE_PROMPT, DECODE_TOKENS = 64, 33
PREFILLS = (512, 2048)
STREAMS = (1, 4, 16, 64)
STREAM_PROMPT, STREAM_TOKENS = 32, 32
AGREE_PROMPTS, AGREE_TOKENS, AGREE_TOP = 8, 24, 20
CONTEXT_TOKENS = 64 * 256
"""Positions of all streams together."""


@dataclass(frozen=True)
class Measure:
    """One kind of task, and what is read off it."""

    name: str
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    read: Callable[[Generated], dict[str, float]]


def single_measures(context: int, prefills: Sequence[int] = PREFILLS) -> list[Measure]:
    lengths = sorted({min(length, context - 1) for length in prefills})
    decode = Measure(
        "decode", 1, DECODE_PROMPT, DECODE_TOKENS, lambda got: {"tokens_per_s": got.decode_tokens_per_s}
    )
    return [decode, *(_prefill(length) for length in lengths)]


def stream_measures(counts: Sequence[int], new_tokens: int = STREAM_TOKENS) -> list[Measure]:
    return [Measure(f"{count} streams", count, STREAM_PROMPT, new_tokens, _read_streams) for count in counts]


def _prefill(length: int) -> Measure:
    return Measure(f"prefill {length}", 1, length, 1, lambda got: {"tokens_per_s": length / got.prefill_s})


def _read_streams(got: Generated) -> dict[str, float]:
    return {
        "tokens_per_s": got.tokens_per_s,
        "first_token_s": median(got.first_s),
        "last_first_token_s": max(got.first_s),
    }


class Rounds:
    """Samples of every contender, measure and figure, in the order of the rounds."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.samples: dict[str, dict[str, dict[str, list[float]]]] = {}
        self.notes: dict[str, dict[str, str]] = {}

    def add(self, measure: str, name: str, figures: Mapping[str, float], note: str) -> None:
        found = self.samples.setdefault(measure, {}).setdefault(name, {})
        for figure, value in figures.items():
            found.setdefault(figure, []).append(value)
        if note:
            self.notes.setdefault(measure, {})[name] = note

    def summary(self, ratios: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Medians and spread; each ratio taken inside one round."""
        return {
            measure: {
                "contenders": {
                    name: {figure: spread(values) for figure, values in figures.items()}
                    for name, figures in found.items()
                },
                "ratios": {
                    f"{one} / {other}": spread(_ratios(found, one, other))
                    for one, other in ratios
                    if one in found and other in found
                },
                "how": self.notes.get(measure, {}),
            }
            for measure, found in self.samples.items()
        }


def _ratios(found: Mapping[str, Mapping[str, list[float]]], one: str, other: str) -> list[float]:
    pairs = zip(found[one]["tokens_per_s"], found[other]["tokens_per_s"], strict=True)
    return [ours / theirs for ours, theirs in pairs]


def make_spec(name: str, model: PeerModel, num_threads: int) -> ContenderSpec:
    """Writes the contender's files where they are not there yet."""
    program, _, form = name.partition(" ")
    if name == "sage-moe served":
        return ContenderSpec(name, "served", str(model.store("bf16")), num_threads, CONTEXT_TOKENS)
    if program == "sage-moe":
        products = "torch" if form == "torch" else None
        path = model.store("bf16" if products or not form else form)
        return ContenderSpec(name, "sage-moe", str(path), num_threads, CONTEXT_TOKENS, products)
    if program == "transformers":
        return ContenderSpec(name, "transformers", str(model.checkpoint()), num_threads, CONTEXT_TOKENS)
    kinds: dict[str, Any] = {"bf16": "bf16", "q8_0": "q8_0", "q4_0": "q4_0"}
    path = model.gguf(kinds[form], num_threads)
    return ContenderSpec(name, "llama.cpp", str(path), num_threads, CONTEXT_TOKENS)


def run_rounds(
    contenders: Mapping[str, ContenderProcess],
    model: PeerModel,
    measures: Sequence[Measure],
    num_rounds: int,
    seconds: float,
) -> Rounds:
    """One more round comes first and is not counted. After that many seconds no new one begins beyond the second."""
    rounds = Rounds(list(contenders))
    started = perf_counter()
    for number in range(num_rounds + 1):
        if number > 2 and perf_counter() - started > seconds:
            break
        for measure in measures:
            prompts = model.prompts(measure.num_prompts, measure.prompt_tokens, seed=1000 + number)
            for name in rounds.names if number % 2 else rounds.names[::-1]:
                got = contenders[name].generate(prompts, measure.new_tokens)
                if number:
                    rounds.add(measure.name, name, measure.read(got), got.note)
                    print(
                        f"round {number}: {measure.name:13} {name:16} {_short(measure.read(got))}", flush=True
                    )
    return rounds


def _short(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def agreement(contenders: Mapping[str, ContenderProcess], model: PeerModel) -> dict[str, Any]:
    """Of every contender with the first: tokens until they part, and log probabilities of the likeliest tokens."""
    first, *others = contenders
    prompts = model.prompts(AGREE_PROMPTS, STREAM_PROMPT, seed=7)
    answers = {name: [one.generate([p], AGREE_TOKENS) for p in prompts] for name, one in contenders.items()}
    found: dict[str, Any] = {}
    for name in others:
        if answers[name][0].text:
            texts = [answer.text[0] for answer in answers[name]]
            found[name] = {"texts": texts, "expected_token_ids": [a.tokens[0] for a in answers[first]]}
            continue
        pairs = [(a.tokens[0], b.tokens[0]) for a, b in zip(answers[first], answers[name], strict=True)]
        differences = []
        for prompt in prompts:
            ours = contenders[first].top_logprobs(prompt, AGREE_TOP)
            theirs = contenders[name].top_logprobs(prompt, AGREE_TOP)
            differences += [abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys()]
        found[name] = {
            "same_answers": sum(ours == theirs for ours, theirs in pairs),
            "answers": len(pairs),
            "tokens_until_they_part": [_common(ours, theirs) for ours, theirs in pairs],
            "logprob_difference": spread(differences),
            "largest_logprob_difference": max(differences),
        }
    return found


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def measure_part(
    options: argparse.Namespace, model: PeerModel, num_threads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns results, and what the contenders say of themselves."""
    names = options.contenders or SETS[options.set]
    specs = [make_spec(name, model, num_threads) for name in names]
    with ExitStack() as stack:
        contenders = {spec.name: stack.enter_context(ContenderProcess(spec)) for spec in specs}
        facts = {name: asdict(one.facts) for name, one in contenders.items()}
        if options.part == "agree":
            results = agreement(contenders, model)
        else:
            measures = (
                single_measures(model.context, options.prefills)
                if options.part == "single"
                else stream_measures(options.streams, options.stream_tokens)
            )
            rounds = run_rounds(contenders, model, measures, options.rounds, options.seconds)
            results = rounds.summary(RATIOS[options.set])
        for name, one in contenders.items():
            facts[name]["memory"] = one.memory()
    if "decode" in results:
        for name, figures in results["decode"]["contenders"].items():
            rate = figures["tokens_per_s"]["median"] * facts[name]["bytes_per_token"] / 1e9
            figures["weights_gb_per_s"] = rate
    return results, facts


def _show(results: Mapping[str, Any]) -> None:
    for measure, found in results.items():
        for name, figures in found.get("contenders", {}).items():
            parts = [
                f"{figure} {value['median'] if isinstance(value, dict) else value:.3f}"
                for figure, value in figures.items()
            ]
            print(f"{measure:13} {name:16} {', '.join(parts)}")
        for pair, ratio in found.get("ratios", {}).items():
            print(f"{measure:13} {pair}: {ratio['median']:.3f} ({ratio['p5']:.3f} to {ratio['p95']:.3f})")


def main() -> None:
    options = _options()
    num_threads = num_cores()
    with ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-peers-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        model = PeerModel(folder, options.model, options.layers, options.vocab_size, options.quick)
        try:
            results, facts = measure_part(options, model, num_threads)
        except ContenderFailed as error:
            sys.exit(str(error))
    _show(results)
    config = {
        "model": model.name,
        "part": options.part,
        "set": options.set,
        "rounds": options.rounds,
        "threads": num_threads,
        "decode": {"prompt": DECODE_PROMPT, "tokens": DECODE_TOKENS},
        "streams": {"prompt": STREAM_PROMPT, "tokens": options.stream_tokens},
        "contenders": facts,
    }
    label = f"_{options.label}" if options.label else ""
    name = f"bench_peers_{model.name}_{options.set}_{options.part}{label}".replace("-", "_")
    finish(name, config, results, is_kept=options.keep)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*sorted(PUBLISHED), BUNDLED], default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, help="of a slice; default: the published one")
    parser.add_argument("--set", choices=sorted(SETS), default="bf16")
    parser.add_argument("--part", choices=("agree", "single", "streams"), default="single")
    parser.add_argument("--contenders", nargs="+", help="of the set; default: all of it")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--stream-tokens", type=int, default=STREAM_TOKENS, help="of each stream's answer")
    parser.add_argument("--prefills", type=int, nargs="*", default=list(PREFILLS), help="lengths of prompts")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones, at least 2")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="begin no further round after this time"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny slice: does it run?")
    parser.add_argument("--folder", type=Path, help="where models stay; default: a temporary one")
    parser.add_argument("--label", default="", help="added to the name of the kept result")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    unknown = set(options.contenders or ()) - set(SETS[options.set])
    if (
        unknown
        or options.rounds < 2
        or options.layers < 1
        or min(*options.streams, options.stream_tokens) < 1
    ):
        parser.error(f"unknown contenders {sorted(unknown)}, or too few rounds, layers or streams")
    return options


if __name__ == "__main__":
    main()
