"""Sizes of memory and budgets as people write them: `512MiB`, `1.5 GB`, `25%`, `fit`. Used for options and the config
file."""

from __future__ import annotations

import re
from fractions import Fraction

from experts.budget import FIT, BudgetRequest

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
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")
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


def parse_budget(text: str) -> BudgetRequest:
    """A size, a percentage of all experts, or `fit`. Raises ValueError like `parse_bytes`."""
    word = text.strip()
    if word.lower() == "fit":
        return FIT
    match = _PERCENT.fullmatch(word)
    if match is not None:
        share = Fraction(match[1]) / 100
        if not 0 < share <= 1:
            raise ValueError("must be above 0% and at most 100%")
        return BudgetRequest(share=share)
    if not word[:1].isdigit() or word.endswith("%"):
        raise ValueError("must be a size such as 2GiB, a percentage such as 25%, or fit")
    return BudgetRequest(num_bytes=parse_bytes(word))


def format_budget(budget: BudgetRequest) -> str:
    """As a user would write it."""
    if budget.num_bytes is not None:
        return format_bytes(budget.num_bytes)
    if budget.share is None:
        return "fit"
    return f"{float(budget.share * 100):.6f}".rstrip("0").rstrip(".") + "%"
