"""Sizes as people write them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.budget import FIT, BudgetRequest
from gateway.byte_sizes import MAX_BYTES, format_budget, format_bytes, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("512MiB", 512 * 2**20),
        ("2GiB", 2**31),
        (" 2 gib ", 2**31),
        ("1.5KiB", 1536),
        ("0.3B", None),
        ("3GB", 3 * 10**9),
        ("7B", 7),
        ("1024TiB", 2**50),
        ("1025TiB", None),
        ("512", None),
        ("", None),
        ("-1MiB", None),
        ("1e3MiB", None),
        ("nanMiB", None),
        ("1MiB2", None),
        ("٣MiB", None),
        ("9" * 5000 + "B", None),
    ],
)
def test_size_is_read_or_refused_with_advice(text: str, num_bytes: int | None) -> None:
    if num_bytes is not None:
        assert parse_bytes(text) == num_bytes
        return
    with pytest.raises(ValueError, match="must be"):
        parse_bytes(text)


def test_unknown_unit_is_named() -> None:
    with pytest.raises(ValueError, match="unknown unit Mbit; use KiB"):
        parse_bytes("3 Mbit")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("fit", FIT),
        (" FIT ", FIT),
        ("2GiB", BudgetRequest(num_bytes=2**31)),
        ("25%", BudgetRequest(share=Fraction(1, 4))),
        ("12.5 %", BudgetRequest(share=Fraction(1, 8))),
        ("100%", BudgetRequest(share=Fraction(1))),
        ("0.000001%", BudgetRequest(share=Fraction(1, 10**8))),
    ],
)
def test_budget_is_read_and_written_back(text: str, budget: BudgetRequest) -> None:
    assert parse_budget(text) == budget
    assert parse_budget(format_budget(budget)) == budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "0%",
        "100.1%",
        "101%",
        "-5%",
        "1e2%",
        "nan%",
        "25",
        "0x5%",
        "٢٥%",
        "fits",
        "-1GiB",
        "9" * 5000,
        "inf",
    ],
)
def test_hostile_budget_is_refused_with_advice(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_budget(text)


@given(st.integers(1, MAX_BYTES))
def test_formatted_size_reads_back(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes
