"""Values from one dtype to another, bit for bit the same on every machine: `sage-moe extract --dtype`.

Widening is exact. Narrowing rounds to the nearest value, ties to even; NaN becomes bfloat16's 0x7FC0 with its sign. A
finite value that the narrower dtype cannot hold is refused, not made infinite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_NUMPY_NAMES = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}


def convert(raw: memoryview, source: str, target: str) -> memoryview:
    """The values of `raw` as bytes of dtype `target`, little-endian. Dtypes as in `manifest.Dtype`.

    Raises OverflowError with the dtype that is too narrow.
    """
    import numpy as np

    if source == target:
        return raw
    values = np.frombuffer(raw, _NUMPY_NAMES[source])
    wide = _widen_bfloat16(values) if source == "bfloat16" else values.astype("<f4", copy=False)
    if target == "float32":
        return wide.view(np.uint8).data
    with np.errstate(over="ignore"):
        narrow = _round_to_bfloat16(wide) if target == "bfloat16" else wide.astype("<f2")
    infinite = (narrow & 0x7FFF) == 0x7F80 if target == "bfloat16" else np.isinf(narrow)
    if bool((infinite & np.isfinite(wide)).any()):
        raise OverflowError(target)
    return narrow.view(np.uint8).data


def _widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """A bfloat16 is the upper half of a float32."""
    widened: np.ndarray = (bits.astype("<u4") << 16).view("<f4")
    return widened


def _round_to_bfloat16(wide: np.ndarray) -> np.ndarray:
    import numpy as np

    bits = wide.view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    quiet = ((bits >> 16) & 0x8000) | 0x7FC0
    narrow: np.ndarray = np.where(np.isnan(wide), quiet, rounded).astype("<u2")
    return narrow
