"""`--budget` of `sage-moe eval`: a size, or a percentage of all experts."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

from experts.store import ExpertStore
from gateway.byte_sizes import parse_bytes
from gateway.errors import OptionInvalid
from gateway.eval_run import expert_bytes
from router.loading import stored_dtype

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")


def read_budget(text: str, root: Path, dtype: str | None) -> int:
    """Bytes. dtype: in which experts are computed; None means as stored. Raises OptionInvalid."""
    match = _PERCENT.fullmatch(text.strip())
    try:
        if match is None:
            return parse_bytes(text)
        share = Fraction(match[1]) / 100
        if not 0 < share <= 1:
            raise ValueError("must be above 0% and at most 100%")
    except ValueError as error:
        raise OptionInvalid("--budget", f"{error}, not {text[:80]!r}; or a percentage such as 25%") from error
    store = ExpertStore.open(root)
    try:
        return int(expert_bytes(store, dtype or stored_dtype(store)) * share)
    finally:
        store.close()
