"""Rates and times as people write them: `10Gb/s`, `1.2 GB/s`, `0.2ms`. Used for the file of nodes."""

from __future__ import annotations

import re

RATE_UNITS = {
    "Mb/s": 10**6 / 8,
    "Gb/s": 10**9 / 8,
    "MB/s": 10**6,
    "GB/s": 10**9,
    "TB/s": 10**12,
    "MiB/s": 2**20,
    "GiB/s": 2**30,
    "TiB/s": 2**40,
}
"""In bytes. Case counts: b is a bit, B a byte."""
TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LEAST_RATE, MOST_RATE = 10.0**4, 10.0**14
MOST_S = 10.0
_NUMBER = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?([A-Za-z/]{1,8})")


def parse_rate(text: str) -> float:
    """Bytes per second. Raises ValueError whose text says what is wrong and what to write."""
    rate = _parse(text, RATE_UNITS, "a rate such as 10Gb/s (bits) or 1.2GB/s (bytes)")
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise ValueError("must be from 0.08Mb/s to 100TB/s")
    return rate


def parse_time(text: str) -> float:
    """Seconds. Raises ValueError like `parse_rate`."""
    seconds = _parse(text, TIME_UNITS, "a time such as 0.2ms or 150us")
    if seconds > MOST_S:
        raise ValueError("must be at most 10s")
    return seconds


def _parse(text: str, units: dict[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"must be {example}; units are {', '.join(units)}")
    return float(match[1]) * units[match[2]]
