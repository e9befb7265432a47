"""Matrices as int8 or int4 codes with scales, bit for bit the same on every machine: `--quantize`.

Both forms are symmetric: a value is its code times its scale. int8 has one scale an output row, int4 one for each group
of consecutive inputs in a row; the last group of a row may be shorter. Scales are bfloat16, and codes are chosen for
the rounded scale, so that every kernel, whatever its dtype, computes with exactly the values that are meant.

int4 has no zero points. At the same bytes, groups half as long do better: relative error 0.083 (groups of 32, no zero
points) against 0.086 (64 with them) for the bundled model's gates, 0.086 against 0.090 for normal values, 0.108
against 0.111 for Student's t with 5 degrees of freedom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from extraction.dtypes import convert

if TYPE_CHECKING:
    import numpy as np

SCALE_BYTES = 2
INT8_LIMIT = 127
INT4_LIMIT = 8
"""Codes go from -8 to 7, stored with 8 added."""
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 32


class Quantization(BaseModel):
    """How a part of a store is quantised; also sizes and shapes of what becomes of a matrix, (outputs, inputs)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Literal["int8", "int4"]
    group_size: Literal[32, 64, 128] | None
    """Inputs that share a scale; None for int8, where a whole row does."""

    @model_validator(mode="after")
    def _has_groups_or_rows(self) -> Self:
        if (self.scheme == "int4") != (self.group_size is not None):
            raise ValueError("int4 has groups of 32, 64 or 128, int8 has none")
        return self

    @property
    def name(self) -> str:
        """`int8`, or `int4` with its groups: what answers and numerics classes say."""
        return self.scheme if self.group_size is None else f"{self.scheme}-g{self.group_size}"

    def num_scales(self, inputs: int) -> int:
        """Of one row."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the bytes that hold the codes: one an int8 code, one for each two int4 codes of a row."""
        outputs, inputs = shape
        return (outputs, inputs) if self.scheme == "int8" else (outputs, -(-inputs // 2))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        outputs, inputs = shape
        return (outputs,) if self.group_size is None else (outputs, self.num_scales(inputs))

    def code_bytes(self, shape: tuple[int, ...]) -> int:
        outputs, row_bytes = self.code_shape(shape)
        return outputs * row_bytes

    def scale_bytes(self, shape: tuple[int, ...]) -> int:
        outputs, inputs = shape
        return outputs * self.num_scales(inputs) * SCALE_BYTES


def quantise_rows(
    raw: memoryview, dtype: str, inputs: int, quantization: Quantization
) -> tuple[memoryview, memoryview]:
    """Codes and scales of whole rows, each as bytes in the store's layout.

    raw: rows of `inputs` values of a manifest's dtype. Raises ValueError where a value is not finite.
    """
    import numpy as np

    values = np.frombuffer(convert(raw, dtype, "float32"), "<f4").reshape(-1, inputs)
    if not bool(np.isfinite(values).all()):
        raise ValueError("has values that are not finite")
    if quantization.group_size is None:
        codes, scales = _int8(values)
    else:
        codes, scales = _int4(values, quantization.group_size)
    return np.ascontiguousarray(codes).reshape(-1).data, scales.reshape(-1).view(np.uint8).data


def _int8(values_RI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    largest = np.abs(values_RI).max(axis=1, keepdims=True)
    scales, steps = _bfloat16_up(largest / np.float32(INT8_LIMIT))
    codes = np.rint(_divide(values_RI, steps)).astype(np.int8)
    return codes.view(np.uint8), scales


def _int4(values_RI: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The group's value of largest size gets code -8, so that all sixteen codes are in use."""
    import numpy as np

    outputs, inputs = values_RI.shape
    padded = np.zeros((outputs, -(-inputs // group_size), group_size), "<f4")
    padded.reshape(outputs, -1)[:, :inputs] = values_RI
    where = np.abs(padded).argmax(axis=2)[..., None]
    largest = np.take_along_axis(padded, where, axis=2)
    scales, steps = _bfloat16_up(largest / np.float32(-INT4_LIMIT))
    codes = np.clip(np.rint(_divide(padded, steps)), -INT4_LIMIT, INT4_LIMIT - 1) + INT4_LIMIT
    codes = codes.astype(np.uint8).reshape(outputs, -1)[:, : inputs + inputs % 2]
    if codes.shape[1] % 2:  # an odd row that fills its groups
        codes = np.pad(codes, ((0, 0), (0, 1)), constant_values=INT4_LIMIT)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


def _divide(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Rows or groups of zeros have the scale 0 and the code 0."""
    import numpy as np

    quotients: np.ndarray = np.divide(values, steps, out=np.zeros_like(values), where=steps != 0)
    return quotients


def _bfloat16_up(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded away from zero, as bfloat16's bits and as float32: no value is then beyond the last code."""
    import numpy as np

    bits = ((scales.astype("<f4").view("<u4") + np.uint32(0xFFFF)) >> 16).astype("<u2")
    return bits, (bits.astype("<u4") << 16).view("<f4")
