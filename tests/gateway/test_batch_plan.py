"""Parts, seeds and what makes a job the same one; no files."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.plan import (
    PART_BYTES,
    PART_ROWS,
    Part,
    RowDefaults,
    cut_lines,
    cut_rows,
    first_difference,
    job_identity,
    pending_parts,
    row_seed,
)


@given(st.lists(st.integers(1, PART_BYTES // 3), max_size=3 * PART_ROWS))
def test_lines_are_in_exactly_one_part_each_and_parts_are_bounded(lengths: list[int]) -> None:
    offsets = [sum(lengths[:n]) for n in range(len(lengths))]
    parts = list(cut_lines(zip(offsets, lengths, strict=True)))
    covered = [row for part in parts for row in range(part.first_row, part.first_row + part.num_rows)]
    assert covered == list(range(len(lengths)))
    for number, part in enumerate(parts):
        assert part.number == number
        assert part.offset == offsets[part.first_row]
        assert 0 < part.num_rows <= PART_ROWS
        end = part.first_row + part.num_rows
        assert part.num_rows == 1 or sum(lengths[part.first_row : end]) <= PART_BYTES


@given(st.integers(0, 5 * PART_ROWS))
def test_rows_are_in_exactly_one_part_each(num_rows: int) -> None:
    parts = cut_rows(num_rows)
    assert [row for p in parts for row in range(p.first_row, p.first_row + p.num_rows)] == list(
        range(num_rows)
    )


def test_pending_parts_are_those_without_a_file() -> None:
    parts = cut_rows(3 * PART_ROWS)
    assert pending_parts(parts, ["part-000001.parquet"]) == [parts[0], parts[2]]


def test_seed_of_a_row_depends_on_job_and_index_alone() -> None:
    seeds = {row_seed(job, index) for job in range(3) for index in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert row_seed(0, 0) == 17766876089856342678  # kept for ever: outputs are repeated with it


def test_difference_names_what_was_changed() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "input_format": "jsonl",
            "input_sha256": "0" * 64,
            "num_rows": 3,
            "store_identity": "1" * 64,
            "model_name": "m",
            "dtype": "bfloat16",
            "defaults": RowDefaults(),
        }
        return job_identity(**(facts | changes))

    assert first_difference(identity(), identity()) is None
    assert first_difference(identity(), identity(input_sha256="2" * 64)) == "another input"
    assert first_difference(identity(), identity(store_identity="2" * 64)) == "another store"
    changed = identity(defaults=RowDefaults(max_tokens=5))
    assert first_difference(identity(), changed) == "max_tokens was None and is 5 now"
    assert first_difference(identity() | {"newer": 1}, identity()) == "newer was 1 and is None now"


def test_part_files_sort_in_the_order_of_rows() -> None:
    files = [Part(number, 0, 1).file for number in (0, 9, 10, 99_999, 999_999)]
    assert files == sorted(files)
