"""What `sage-moe eval` says: one JSON object, a table for people, one Parquet row a window."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from gateway.evaluation.run import Evaluation, TextScore
from gateway.evaluation.statistics import estimate

METHOD = "clusters: windows; strata: texts; linearised standard error of a ratio, normal quantile"
"""Of the confidence interval; see `gateway.evaluation.statistics`."""
CACHE_START = "cold"
"""Nothing is resident at the first text; every other text starts with what those before it left."""


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Totals, how they were found, and the same numbers text by text."""
    options = evaluation.options
    texts = evaluation.texts
    setting = {
        "policy": options.policy,
        "effort": options.routing.effort,
        "budget_bytes": evaluation.budget_bytes,
        "eviction": options.eviction,
    }
    return {
        **_numbers(texts),
        **setting,
        "snarc_weights": asdict(options.snarc) if options.routing.policy == "snarc" else None,
        "quantization": evaluation.quantization,
        "backbone_bytes": evaluation.backbone_bytes,
        "expert_bytes": evaluation.expert_bytes,
        "cache_start": CACHE_START,
        "context": options.sliding.context,
        "stride": options.sliding.stride,
        "batch_tokens": options.batch_tokens,
        "is_one_stream": options.is_one_stream,
        "confidence_method": METHOD,
        "store": evaluation.store_hash,
        "dtype": evaluation.dtype,
        "numerics_class": evaluation.numerics_class,
        "texts": [{"text": score.text.name, **_numbers([score])} for score in texts],
    }


def _numbers(scores: Sequence[TextScore]) -> dict[str, Any]:
    found = estimate([score.clusters for score in scores])
    counts = [score.experts for score in scores]
    seconds = sum(score.seconds for score in scores)
    uses = sum(count.hits + count.misses + count.stand_ins for count in counts)
    misses = sum(count.misses for count in counts)
    choice_misses = [count.choice_misses for count in counts]
    return {
        "perplexity": found.ratio,
        "perplexity_95": found.ratio_95,
        "nll": found.mean,
        "nll_standard_error": found.standard_error,
        "misses": misses,
        "hits": sum(count.hits for count in counts),
        "stand_ins": sum(count.stand_ins for count in counts),
        "miss_rate": misses / uses if uses else 0.0,
        "choice_misses": None if None in choice_misses else sum(filter(None, choice_misses)),
        "first_loads": sum(count.first_loads for count in counts),
        "bytes_read": sum(count.bytes_read for count in counts),
        "tokens": found.num_tokens,
        "computed_tokens": sum(s.window.end - s.window.first for score in scores for s in score.windows),
        "windows": sum(len(score.windows) for score in scores),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(found.num_tokens / seconds, 3),
    }


def render(report: dict[str, Any]) -> Table:
    """For people: one line a text and one for all."""
    title = (
        f"{report['policy']} at {_effort(report['effort'])}, {_weights(report)}, "
        f"windows of {report['context']} by {report['stride']}, "
        + ("one stream" if report["is_one_stream"] else f"{report['batch_tokens']} rows a step")
    )
    table = Table(title=title, title_justify="left")
    table.add_column("text")
    for column in ("tokens", "perplexity", "95%", "missed", "MiB read", "tokens/s"):
        table.add_column(column, justify="right")
    for row in report["texts"]:
        table.add_row(row["text"], *_cells(row))
    if len(report["texts"]) > 1:
        table.add_section()
        table.add_row("all", *_cells(report))
    return table


def _weights(report: dict[str, Any]) -> str:
    """What they are and how much memory they take: what quantisation saves, beside what it costs."""
    form = f", quantised ({report['quantization']})" if report["quantization"] else ""
    backbone, experts = (report[name] / 2**20 for name in ("backbone_bytes", "budget_bytes"))
    return f"{report['dtype']}{form}, {backbone:,.1f} MiB of backbone and {experts:,.1f} MiB of experts"


def _effort(effort: str) -> str:
    """States as people write them."""
    return effort if effort == "auto" else effort.upper()


def _cells(row: dict[str, Any]) -> list[str]:
    interval = row["perplexity_95"]
    return [
        f"{row['tokens']:,}",
        f"{row['perplexity']:.3f}",
        "-" if interval is None else f"{interval[0]:.1f}-{interval[1]:.1f}",
        f"{row['miss_rate']:.1%}",
        f"{row['bytes_read'] / 2**20:,.1f}",
        f"{row['tokens_per_s']:,.0f}",
    ]


WINDOW_SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("scored_first", pa.int64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
        pa.field("logprobs", pa.list_(pa.float64()), nullable=False),
    ]
)
"""One row a window: where it begins in its text, its first scored token, how many follow, the sum of their negative
log likelihoods in nats, and each token's log probability."""


def windows_parquet(evaluation: Evaluation) -> bytes:
    rows = [
        {
            "text": score.text.name,
            "window": number,
            "first": found.window.first,
            "scored_first": found.window.scored_first,
            "tokens": found.cluster.num_tokens,
            "nll": found.cluster.nll,
            "logprobs": found.logprobs,
        }
        for score in evaluation.texts
        for number, found in enumerate(score.windows)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, WINDOW_SCHEMA), buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()
