"""How a batch job is cut into parts, what makes it the same job again, and which rows draw which noise (pure).

A part is the unit of exactly once: it is in the output whole or not at all. Called by `gateway.batch.source`,
`gateway.batch.output` and `gateway.batch.rows`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from extraction.manifest import Manifest

FORMAT_VERSION = 1
PART_ROWS = 256
PART_BYTES = 16 * 1024 * 1024
"""Of JSON lines in one part; bounds what is lost at a kill and held in memory where rows are long."""
MAX_INPUT_ROWS = 10**9

InputFormat = Literal["jsonl", "parquet"]


@dataclass(frozen=True)
class Part:
    """Consecutive rows of the input that become one file of the output."""

    number: int
    first_row: int
    num_rows: int
    offset: int = 0
    """Of the first row's line in a JSONL file; unused for Parquet."""

    @property
    def file(self) -> str:
        return f"part-{self.number:06}.parquet"


@dataclass(frozen=True)
class RowDefaults:
    """Values for what a row leaves out; None leaves it to the model, as over HTTP."""

    seed: int = 0
    """Of the job. A row without a seed of its own gets one from this and its index."""
    max_tokens: int | None = None
    temperature: float | None = None


NO_DEFAULTS = RowDefaults()


def row_seed(job_seed: int, index: int) -> int:
    """The seed of a row that has none: 64 bits that depend on the job's seed and the row's index alone."""
    return int.from_bytes(hashlib.sha256(f"sage-moe batch {job_seed} {index}".encode()).digest()[:8], "big")


def cut_rows(num_rows: int) -> tuple[Part, ...]:
    """Parts of PART_ROWS rows each, the last one maybe shorter."""
    starts = range(0, num_rows, PART_ROWS)
    return tuple(Part(n, start, min(PART_ROWS, num_rows - start)) for n, start in enumerate(starts))


def cut_lines(lines: Iterable[tuple[int, int]]) -> Iterator[Part]:
    """Parts of lines given as (offset, length in bytes): at most PART_ROWS, and PART_BYTES beyond the first line."""
    number = first_row = count = first_offset = num_bytes = 0
    for offset, length in lines:
        if count == PART_ROWS or (count and num_bytes + length > PART_BYTES):
            yield Part(number, first_row, count, first_offset)
            number, first_row, count, num_bytes = number + 1, first_row + count, 0, 0
        if not count:
            first_offset = offset
        count += 1
        num_bytes += length
    if count:
        yield Part(number, first_row, count, first_offset)


def pending_parts(parts: Sequence[Part], done_files: Iterable[str]) -> list[Part]:
    """Parts that are not in the output yet, in order."""
    done = frozenset(done_files)
    return [part for part in parts if part.file not in done]


def job_identity(
    input_format: InputFormat,
    input_sha256: str,
    num_rows: int,
    store_identity: str,
    model_name: str,
    dtype: str,
    defaults: RowDefaults,
) -> dict[str, Any]:
    """Everything that the output's rows depend on but the machine; kept in the output, and compared when a run goes
    on with it."""
    return {
        "format_version": FORMAT_VERSION,
        "input": {"format": input_format, "sha256": input_sha256, "rows": num_rows},
        "store": store_identity,
        "model": model_name,
        "dtype": dtype,
        "seed": defaults.seed,
        "max_tokens": defaults.max_tokens,
        "temperature": defaults.temperature,
        "part_rows": PART_ROWS,
        "part_bytes": PART_BYTES,
    }


def store_identity(manifest: Manifest) -> str:
    """SHA-256 over the manifest without the folder of the shards: an index made again elsewhere is the same model."""
    return hashlib.sha256(manifest.model_dump_json(exclude={"source_root"}).encode()).hexdigest()


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What another job differs in, in words, or None where they are the same."""
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old != new:
            is_shown = not isinstance(old, dict) and name not in ("input", "store")
            return f"{name} was {old!r} and is {new!r} now" if is_shown else f"another {name}"
    return None
