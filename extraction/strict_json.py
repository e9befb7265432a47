"""JSON that somebody else wrote, parsed with limits: what passes can be written again and read by any reader.

Python's parser takes more than JSON allows (NaN, Infinity, halves of surrogate pairs) and nests deeper than others do.
Called by `extraction.plan` and `extraction.safetensors_file`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from extraction.errors import CheckpointDamaged

MAX_DEPTH = 64


class _Refused(ValueError):
    """Why a parsed value is not taken."""


def parse_object(raw: bytes, file: str, *, what: str = "", has_unique_keys: bool = False) -> dict[str, Any]:
    """A JSON object. `what` starts the reason when not the whole file is meant, for one "has a header that ".

    has_unique_keys refuses a key that comes twice, of which two readers could take different ones.
    Raises CheckpointDamaged.
    """
    try:
        value = json.loads(raw, object_pairs_hook=_unique if has_unique_keys else None)
        if not isinstance(value, dict):
            raise _Refused("is no JSON object")
        _check(value, MAX_DEPTH)
    except _Refused as error:
        raise CheckpointDamaged(file, what + str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(file, what + "is no JSON") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _Refused(f"names {key[:200]!r} twice")
    return table


def _check(value: Any, depth: int) -> None:
    if depth == 0:
        raise _Refused(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _Refused("holds a number that JSON does not know: infinite or NaN")


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _Refused("holds half of a surrogate pair, which is no text")
