"""Rates and times with units."""

from __future__ import annotations

import pytest

from gateway.rates import parse_rate, parse_time


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [
        ("1Gb/s", 1.25e8),
        ("10 Gb/s", 1.25e9),
        ("1.5GB/s", 1.5e9),
        ("100Mb/s", 1.25e7),
        ("2GiB/s", 2.0 * 2**30),
    ],
)
def test_small_b_is_a_bit_and_large_b_a_byte(text: str, bytes_s: float) -> None:
    assert parse_rate(text) == pytest.approx(bytes_s)


@pytest.mark.parametrize(
    ("text", "seconds"), [("150us", 150e-6), ("0.2 ms", 0.2e-3), ("1s", 1.0), ("0ms", 0.0)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "10", "10gb/s", "10Gbit", "-1Gb/s", "1e9GB/s", "nanGB/s", "1GB/s\n2", "０Gb/s"]
)
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="must be a rate such as 10Gb/s"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0GB/s", "999999999999TB/s"])
def test_rate_beyond_any_link_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be from"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["11s", "999999999999ms"])
def test_time_beyond_use_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at most 10s"):
        parse_time(text)
