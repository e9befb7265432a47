"""Sizes of memory as people write them: `512MiB`, `2GiB`, `1.5 GB`. Used for options and the config file."""

from __future__ import annotations

import re

UNITS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
MAX_BYTES = 2**50
"""More than any machine has; a larger number is a slip."""
_SIZE = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,6})?) ?([A-Za-z]+)")


def parse_bytes(text: str) -> int:
    """Bytes, rounded down. Raises ValueError whose text says what is wrong and what to write."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("must be a size such as 512MiB or 2GiB")
    number, unit = match.groups()
    factor = UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"has the unknown unit {unit[:20]}; use KiB, MiB, GiB or TiB")
    whole, _, fraction = number.partition(".")
    num_bytes = int(whole + fraction) * factor // int(f"1{'0' * len(fraction)}")
    if not 1 <= num_bytes <= MAX_BYTES:
        raise ValueError("must be from 1B to 1024TiB")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """The size in the largest unit that divides it, so that `parse_bytes` gives the same number back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes and num_bytes % UNITS[unit.lower()] == 0:
            return f"{num_bytes // UNITS[unit.lower()]}{unit}"
    return f"{num_bytes}B"
