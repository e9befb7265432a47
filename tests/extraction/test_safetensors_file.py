"""Headers: what is written opens with the `safetensors` library, what is damaged is refused and never crashes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from extraction.errors import CheckpointDamaged
from extraction.safetensors_file import ALIGNMENT, read_header, write_header


def _read(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        tensors = read_header(descriptor, path.name)
    finally:
        os.close(descriptor)
    return {name: (t.code, t.shape, t.offset, t.nbytes) for name, t in tensors.items()}


def test_file_of_the_library_is_read_with_absolute_offsets(tmp_path: Path) -> None:
    a, b = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.ones(5, dtype=torch.bfloat16)
    save_file({"a": a, "b": b}, tmp_path / "f.safetensors")
    tensors = _read(tmp_path / "f.safetensors")
    raw = (tmp_path / "f.safetensors").read_bytes()
    code, shape, offset, nbytes = tensors["a"]
    assert (code, shape) == ("F32", (2, 3))
    assert raw[offset : offset + nbytes] == a.numpy().tobytes()
    assert tensors["b"][:2] == ("BF16", (5,))


def test_written_header_is_aligned_and_opens_with_the_library(tmp_path: Path) -> None:
    header = write_header([("x", "F32", (2,), 8), ("padding.1", "U8", (3,), 3), ("y", "U8", (1,), 1)])
    (tmp_path / "f.safetensors").write_bytes(header + struct.pack("<2f", 1.5, -2.0) + bytes(3) + b"\x07")
    assert len(header) % ALIGNMENT == 0
    tensors = load_file(tmp_path / "f.safetensors")
    assert tensors["x"].tolist() == [1.5, -2.0]
    assert tensors["y"].tolist() == [7]


def _file(table: object, data: bytes) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(begin: int, end: int, shape: list[object] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def _repeated() -> bytes:
    """The same name with two meanings."""
    text = b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "a": 7}'
    return struct.pack("<Q", len(text)) + text + b"abcd"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no header"),
        (struct.pack("<Q", 1 << 60), "header of"),
        (struct.pack("<Q", 4) + b"nope", "no JSON"),
        (_file([1], b""), "no JSON object"),
        (_file({"a": _entry(0, 4)}, b"abc"), "cut short"),
        (_file({"a": _entry(0, 4)}, b"abcde"), "behind its last tensor"),
        (_file({"a": _entry(0, 3), "b": _entry(2, 4)}, b"abcd"), "overlaps"),
        (_file({"a": _entry(1, 4)}, b"abcd"), "leaves a gap"),
        (_file({"a": _entry(0, 4, [5])}, b"abcd"), "do not hold"),
        (_file({"a": _entry(0, 4, [-4])}, b"abcd"), "no whole number"),
        (_file({"a": _entry(0, 4, [True, 4])}, b"abcd"), "no whole number"),
        (_file({"a": _entry(0, 4, dtype="PICKLE")}, b"abcd"), "unknown entry"),
        (_file({"a": 7}, b""), "unknown entry"),
        (_file({"a": _entry(0, 4, [1] * 17 + [4])}, b"abcd"), "no whole number"),
        (_file({"a": _entry(0, 4, [10**4000] * 50)}, b"abcd"), "no whole number"),
        (_file({"a": _entry(1 << 64, (1 << 64) + 4, [4])}, b"abcd"), "no whole number"),
        (_repeated(), "names 'a' twice"),
        (_file({"\ud800": _entry(0, 0)}, b""), "surrogate"),
        (_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"a"), "unknown entry"),
    ],
)
def test_damaged_header_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=reason):
        _read(tmp_path / "f.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_file_is_read_or_refused_but_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(_file({"a": _entry(0, 4), "b": _entry(4, 8, [2], "F16")}, b"abcdefgh"))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    (tmp_path / "f.safetensors").write_bytes(raw)
    try:
        tensors = _read(tmp_path / "f.safetensors")
    except CheckpointDamaged:
        return
    assert all(offset + nbytes <= len(raw) for _, _, offset, nbytes in tensors.values())
