"""What does it cost in quality and in misses to run the bundled model in a fraction of its memory?

Reproduces every number and picture of docs/quality.md, over the texts of `benchmarks/texts`. Works in parts: each is
kept when it is done, so that a run that was stopped goes on with the next one, and a part is computed again only where
its settings or the model changed. Perplexities are deterministic and may be measured on a busy machine; speeds may not
and are left out.

Usage: python -m benchmarks.quality [--part NAME ...] [--max-tokens N] [--work FOLDER] [--keep]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_stores import NOT_QUANTISED, STORES, store_bytes, store_of
from benchmarks.quality_ways import FRONTIER, SHARES, SINGLE, SINGLE_SHARE, Way, against, windows_of
from benchmarks.report import RESULTS, TEXTS, finish
from experts.budget import BudgetRequest
from experts.store import ExpertStore
from gateway.byte_sizes import parse_budget
from gateway.evaluation.page import draw_page
from gateway.evaluation.plots import FrontierPoint, draw_frontier, draw_miss_curves, new_figure, to_png
from gateway.evaluation.report import as_json
from gateway.evaluation.routing import by_text, select
from gateway.evaluation.run import EvalOptions, EvalText, Evaluation, evaluate, read_texts
from gateway.evaluation.windows import Sliding, cut_windows
from gateway.local.study import Study
from gateway.output_file import write_output
from gateway.stores.source import resolve_checkpoint, resolve_store
from gateway.text.tokenizer import TextTokenizer
from router.trace_reader import read_trace
from router.trace_statistics import busier_half, miss_curves, moe_layers, use_counts, use_entropy

MODEL = "stories"
NAMES = ("brown-fairy-book.txt", "treasure-island.txt", "wikitext-2-test.txt")
SLIDING = Sliding(256, 128)
BUDGETS = ("100%", "50%", "25%", "12.5%", "one expert")
MISS_SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
MISS_TOKENS = 16384
"""Of each text; as many as the curves need to settle, in minutes."""
FRONTIER_TOKENS = 8192
"""Of each text, for every way of routing; those of FULL_WAYS go over all of the texts as well."""
FULL_WAYS = ("thrifty",)
TIMES = ("seconds", "tokens_per_s")


@dataclass(frozen=True)
class Job:
    """What all parts share."""

    root: Path
    weights: str
    """Their hash, which is the same wherever the checkpoint lies; that of an index over it is not."""
    max_tokens: int | None
    work: Path

    @property
    def trace(self) -> Path:
        return self.work / f"trace-{self.weights[:16]}-{self.max_tokens or 'all'}.parquet"

    def picture(self, name: str) -> Path:
        return self.work / f"quality_{name}.png"

    def evaluate(self, options: EvalOptions) -> Evaluation:
        return evaluate(self.root, self.read_texts, options, _show)

    def read_texts(self, tokenizer: TextTokenizer) -> list[EvalText]:
        return read_texts(tokenizer, [TEXTS / name for name in NAMES], self.max_tokens)

    def settings(self) -> dict[str, Any]:
        """What a part's numbers depend on; a kept part with others is computed again."""
        return {
            "model": MODEL,
            "weights": self.weights,
            "texts": list(NAMES),
            "max_tokens": self.max_tokens,
            "context": SLIDING.context,
            "stride": SLIDING.stride,
            "miss_shares": list(MISS_SHARES),
            "miss_tokens": MISS_TOKENS,
        }


def native_at(budget: str, job: Job) -> dict[str, Any]:
    """Perplexity under native routing at one budget; misses are those of steps of 512 rows."""
    options = EvalOptions(SLIDING, budgets=(_request(job, budget),))
    return _without_times(as_json(job.evaluate(options)))


def _request(job: Job, budget: str) -> BudgetRequest:
    if budget != "one expert":
        return parse_budget(budget)
    store = ExpertStore.open(job.root)
    try:
        return BudgetRequest(num_bytes=max(store.record(key).nbytes for key in store.expert_keys()))
    finally:
        store.close()


def routing(job: Job) -> dict[str, Any]:
    """How evenly experts are used, by text and layer; draws the page of `sage-moe eval --plot`."""
    evaluation = _traced(job)
    table = by_text(read_trace(job.trace), evaluation.windows)
    write_output(job.picture("routing"), draw_page(evaluation, job.trace))
    layers = moe_layers(table)
    found: dict[str, Any] = {"layers": layers}
    for number, name in enumerate(table.names):
        counts = use_counts(select(table, table.requests_N == number))
        found[name] = {
            "entropy": _rounded(use_entropy(counts)[layers]),
            "busier_half": _rounded(busier_half(counts)[layers]),
            "unused": (counts[layers] == 0).sum(axis=1).tolist(),
        }
    return found


def misses(job: Job) -> dict[str, Any]:
    """Misses token by token, as one stream decodes, by eviction and share of experts that stays, from a cold cache;
    draws the curves."""
    if not job.trace.exists():
        _traced(job)
    texts = job.read_texts(TextTokenizer.from_folder(job.root))
    windows = {text.name: cut_windows(len(text.ids), SLIDING) for text in texts}
    table = by_text(read_trace(job.trace), windows)
    figure = new_figure(4.3 * len(table.names), 4.0)
    axes = figure.subplots(1, len(table.names), squeeze=False)[0]
    found: dict[str, Any] = {"shares": list(MISS_SHARES)}
    for number, name in enumerate(table.names):
        part = select(table, table.requests_N == number)
        curves = miss_curves(part, MISS_SHARES, MISS_TOKENS)
        draw_miss_curves(axes[number], MISS_SHARES, curves, f"Native routing, {name}")
        found[name] = {curve.eviction: [round(rate, 5) for rate in curve.miss_rates] for curve in curves}
    write_output(job.picture("misses"), to_png(figure))
    return found


def native_windows(max_tokens: int | None, job: Job) -> dict[str, Any]:
    """What every way of routing is compared with, window by window."""
    evaluation = replace(job, max_tokens=max_tokens).evaluate(EvalOptions(SLIDING))
    return {"windows": windows_of(evaluation)}


def way_at(way: Way, share: str, max_tokens: int | None, job: Job) -> dict[str, Any]:
    """Misses of one decoding stream and the perplexity that they come with, routed one way."""
    base = run_part(_base_name(max_tokens), job)["windows"]
    evaluation = replace(job, max_tokens=max_tokens).evaluate(way.options(SLIDING, share))
    return against(evaluation, base)


def quantised(name: str, job: Job) -> dict[str, Any]:
    """Perplexity of a quantised store under native routing, and what it takes on disk and in memory."""
    root = store_of(name, resolve_checkpoint(MODEL), job.work / f"stores-{job.weights[:16]}")
    evaluation = replace(job, root=root).evaluate(EvalOptions(SLIDING))
    report = as_json(evaluation)
    found = {key: report[key] for key in ("perplexity", "perplexity_95", "nll", "tokens", "numerics_class")}
    found["texts"] = {text["text"]: text["perplexity"] for text in report["texts"]}
    if name == NOT_QUANTISED:
        return store_bytes(root) | found | {"windows": windows_of(evaluation)}
    base = run_part(f"quantised {NOT_QUANTISED}", job)["windows"]
    return store_bytes(root) | found | {"against bf16": against(evaluation, base)}


def _base_name(max_tokens: int | None) -> str:
    return f"windows {max_tokens or 'all'}"


PARTS: dict[str, Callable[[Job], dict[str, Any]]] = {
    **{f"native {budget}": partial(native_at, budget) for budget in BUDGETS},
    "routing": routing,
    "misses": misses,
    **{_base_name(tokens): partial(native_windows, tokens) for tokens in (FRONTIER_TOKENS, None)},
    **{
        f"frontier {share} {name}": partial(way_at, way, share, FRONTIER_TOKENS)
        for name, way in FRONTIER.items()
        for share in SHARES
    },
    **{
        f"frontier {SINGLE_SHARE} {name}": partial(way_at, way, SINGLE_SHARE, FRONTIER_TOKENS)
        for name, way in SINGLE.items()
    },
    **{f"quantised {name}": partial(quantised, name) for name in STORES},
    **{f"full {name}": partial(way_at, FRONTIER[name], SINGLE_SHARE, None) for name in FULL_WAYS},
}
"""In the order in which they are computed."""


def _traced(job: Job) -> Evaluation:
    """Leaves the trace of the texts' native routing."""
    return job.evaluate(EvalOptions(SLIDING, study=Study(trace=job.trace)))


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _without_times(report: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in report.items() if key not in TIMES}
    kept["texts"] = [{k: v for k, v in text.items() if k not in TIMES} for text in report["texts"]]
    return kept


def _show(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done:,} of {total:,} tokens")
    if done == total:
        sys.stderr.write("\n")
    sys.stderr.flush()


def run_part(name: str, job: Job) -> dict[str, Any]:
    """A part's numbers: those that are kept where the settings are the same, else new ones, which are kept."""
    kept = job.work / f"{name.replace(' ', '-')}.json"
    settings = job.settings()
    if kept.exists():
        record = json.loads(kept.read_text())
        if record["settings"] == settings:
            return dict(record["results"])
    sys.stderr.write(f"{name} ...\n")
    started = time.perf_counter()
    results = PARTS[name](job)
    record = {"settings": settings, "results": results, "seconds": round(time.perf_counter() - started)}
    write_output(kept, json.dumps(record, indent=1).encode())
    return results


def draw_frontiers(job: Job, results: dict[str, Any]) -> None:
    """Perplexity, as a multiple of the native one, against misses: a panel for all texts and one for each."""
    if any(f"frontier {share} {name}" not in results for share in SHARES for name in FRONTIER):
        return
    frontier = {name: {share: results[f"frontier {share} {name}"] for share in SHARES} for name in FRONTIER}
    figure = new_figure(4.3 * (1 + len(NAMES)), 4.0)
    panels = figure.subplots(1, 1 + len(NAMES), squeeze=False)[0]
    for axes, text in zip(panels, (None, *NAMES), strict=True):
        series = {
            name: [
                _point(share, part if text is None else part["texts"][text]) for share, part in parts.items()
            ]
            for name, parts in frontier.items()
        }
        title = "all texts" if text is None else text
        draw_frontier(axes, series, f"{title} (labels: resident share)", "perplexity, native = 1")
    write_output(job.picture("frontier"), to_png(figure))


def _point(share: str, part: dict[str, Any]) -> FrontierPoint:
    interval = part["perplexity_to_native_95"]
    return FrontierPoint(
        part["miss_rate"],
        part["perplexity_to_native"],
        share,
        None if interval is None else (interval[0], interval[1]),
    )


def hash_weights(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's weights, in hex, shard after shard."""
    digest = hashlib.sha256()
    for shard in sorted(checkpoint.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return digest.hexdigest()


def check_native(results: dict[str, Any]) -> None:
    """Native perplexity is the same to the digit at every budget, and from a copy of the checkpoint."""
    copied = f"quantised {NOT_QUANTISED}"
    found = {
        name: part["nll"] for name, part in results.items() if name.startswith("native ") or name == copied
    }
    if len(set(found.values())) > 1:
        raise SystemExit(f"native routing is not exact: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; repeatable")
    parser.add_argument("--max-tokens", type=int, help="of each text, the first so many")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="where parts are kept")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    root = resolve_store(MODEL, announce=lambda line: print(line, file=sys.stderr))
    job = Job(root, hash_weights(resolve_checkpoint(MODEL)), arguments.max_tokens, arguments.work)
    results = {name: run_part(name, job) for name in arguments.part or PARTS}
    check_native(results)
    draw_frontiers(job, results)
    if arguments.keep:
        for picture in job.work.glob("quality_*.png"):
            write_output(RESULTS / picture.name, picture.read_bytes())
    finish("quality", job.settings(), results, is_kept=arguments.keep)


if __name__ == "__main__":
    main()
