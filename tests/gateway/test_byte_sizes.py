"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.byte_sizes import MAX_BYTES, format_bytes, parse_bytes


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


@given(st.integers(1, MAX_BYTES))
def test_formatted_size_reads_back(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes
