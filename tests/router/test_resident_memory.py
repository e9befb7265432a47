"""The kernel's count of a generating process against what its budget was counted to, under a real memory cap."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bench_rss import allowance, compare, write_random_checkpoint
from extraction.extract import extract

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rss")
    extract(write_random_checkpoint(folder / "checkpoint"), folder / "store", index_only=True)
    results = compare(folder / "store", "12.5%", 200)
    if not results["capped"]["is_capped"]:
        pytest.skip(f"no memory cap here: {results['capped']['no_cap_because']}")
    return results


def test_process_under_a_cap_of_what_was_counted_lives_and_stays_within(measured: dict[str, Any]) -> None:
    capped = measured["capped"]
    assert capped["exit_code"] == 0, capped
    assert capped["tokens"] >= 200
    assert capped["expert_bytes_held"] <= capped["counted"]["budget"]
    assert capped["peak_rss"] <= allowance(capped)


def test_the_same_without_a_budget_would_not_stay_within(measured: dict[str, Any]) -> None:
    unlimited = measured["unlimited"]
    assert unlimited["exit_code"] == 0, unlimited
    assert unlimited["peak_rss"] > 1.5 * allowance(measured["capped"])
