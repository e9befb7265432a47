"""Safetensors headers: parsed with limits, and written so that tensors fall where we want them.

Reads no tensor data. A header from outside is hostile until every offset was checked against the file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from extraction.errors import CheckpointDamaged
from extraction.manifest import Dtype
from extraction.strict_json import parse_object

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_NUMBER = 1 << 60
ALIGNMENT = 4096
DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Safetensors dtype -> ours."""
CODES: dict[str, str] = {name: code for code, name in DTYPES.items()}
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file. `offset` counts from the start of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(descriptor: int, file: str) -> dict[str, TensorHeader]:
    """All tensors of an open safetensors file. `file` is for messages. Raises CheckpointDamaged."""
    size = os.fstat(descriptor).st_size
    prefix = _pread(descriptor, 8, 0, file)
    if len(prefix) < 8:
        raise CheckpointDamaged(file, f"is cut short: {size} bytes, no header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointDamaged(
            file, f"is cut short or no safetensors file: header of {length} bytes in {size}"
        )
    raw = _pread(descriptor, length, 8, file)
    table = parse_object(raw, file, what="has a header that ", has_unique_keys=True)
    table.pop("__metadata__", None)
    tensors = [_tensor(name, entry, 8 + length, file) for name, entry in table.items()]
    _check_layout(tensors, 8 + length, size, file)
    return {tensor.name: tensor for tensor in tensors}


def _pread(descriptor: int, nbytes: int, offset: int, file: str) -> bytes:
    try:
        return os.pread(descriptor, nbytes, offset)
    except OSError as error:
        raise CheckpointDamaged(file, f"cannot be read at offset {offset}: {error.strerror}") from error


def _tensor(name: str, entry: Any, data_start: int, file: str) -> TensorHeader:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = _ITEM_BITS[code]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(file, f"tensor {name[:200]!r} has a damaged or unknown entry") from error
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    numbers = [begin, end, *(shape if is_shape else [None])]
    if not all(type(number) is int and 0 <= number <= MAX_NUMBER for number in numbers):
        raise CheckpointDamaged(file, f"tensor {name[:200]!r} has a shape or offset that is no whole number")
    if math.prod(shape) * bits != (end - begin) * 8:
        raise CheckpointDamaged(
            file, f"tensor {name[:200]!r}: {end - begin} bytes do not hold {code} {shape}"
        )
    return TensorHeader(name, code, tuple(shape), data_start + begin, end - begin)


def _check_layout(tensors: Sequence[TensorHeader], data_start: int, size: int, file: str) -> None:
    """Tensors must follow each other without gaps or overlap and end where the file ends."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            raise CheckpointDamaged(file, f"tensor {tensor.name[:200]!r} overlaps another or leaves a gap")
        position += tensor.nbytes
    if position > size:
        raise CheckpointDamaged(file, f"is cut short: {size} bytes, the header promises {position}")
    if position < size:
        raise CheckpointDamaged(file, f"has {size - position} bytes behind its last tensor")


def write_header(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Header for tensors (name, dtype code, shape, bytes) in this order, padded so that data starts aligned."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, code, shape, nbytes in tensors:
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
