"""Quantised stores: codes against a slow plain reference, and stores against their checkpoint."""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extraction import copying
from extraction.errors import OptionRefused, StoreDiffers, TensorUnexpected
from extraction.expert_index import read_expert_index
from extraction.extract import extract
from extraction.journal import Journal
from extraction.manifest import ROLES, SCALE_ROLES, ExpertKey, read_manifest, store_hash
from extraction.quantise import Quantization, quantise_rows
from extraction.quantised_parts import QuantisedParts
from extraction.summary import summarize
from extraction.verify import verify
from tests.checkpoints import write_tiny_qwen3_moe

INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
INT4_64 = Quantization(scheme="int4", group_size=64)
ODD = {"hidden_size": 52, "moe_intermediate_size": 35}


def _bfloat16_up(value: float) -> tuple[int, float]:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    upper = (bits + 0xFFFF) >> 16
    return upper, struct.unpack("<f", struct.pack("<I", upper << 16))[0]


def _plain(row: list[float], quantization: Quantization) -> tuple[bytes, list[int]]:
    """One row by the document, value by value: its code bytes, and the bits of its scales."""
    is_int8 = quantization.group_size is None
    size = quantization.group_size or len(row)
    codes: list[int] = []
    scales = []
    for first in range(0, len(row), size):
        group = row[first : first + size]
        largest = max(group, key=abs)
        exact = (
            np.float32(abs(largest)) / np.float32(127) if is_int8 else np.float32(largest) / np.float32(-8)
        )
        bits, scale = _bfloat16_up(float(exact))
        scales.append(bits)
        for value in group:
            code = round(float(np.float32(value) / np.float32(scale))) if scale else 0
            codes.append(code if is_int8 else min(7, max(-8, code)))
    if is_int8:
        return bytes(code & 0xFF for code in codes), scales
    codes += [0] * (len(codes) % 2)
    return bytes(
        (low + 8) | (high + 8) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)
    ), scales


@pytest.mark.parametrize("quantization", [INT8, INT4, INT4_64])
@pytest.mark.parametrize("inputs", [1, 2, 31, 32, 33, 63, 65, 96])
def test_codes_and_scales_are_those_of_the_plain_reference(quantization: Quantization, inputs: int) -> None:
    values = np.random.default_rng(inputs).standard_normal((5, inputs)).astype("<f4")
    values[1] = 0
    values[2] = -np.abs(values[2])
    values[3] *= np.float32(1e-39)
    raw = values.tobytes()
    codes, scales = quantise_rows(memoryview(raw), "float32", inputs, quantization)
    expected = [_plain(row, quantization) for row in values.tolist()]
    assert bytes(codes) == b"".join(row for row, _ in expected)
    assert np.frombuffer(scales, "<u2").tolist() == [bits for _, row in expected for bits in row]
    assert len(codes) == quantization.code_bytes((5, inputs))
    assert len(scales) == quantization.scale_bytes((5, inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_float_dtype_gives_the_codes_of_its_values(dtype: str) -> None:
    values = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    raw = bytes(values.view(torch.uint8).numpy().data)
    wide = bytes(values.float().view(torch.uint8).numpy().data)
    found = quantise_rows(memoryview(raw), dtype, 40, INT4)
    assert list(map(bytes, found)) == list(map(bytes, quantise_rows(memoryview(wide), "float32", 40, INT4)))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_value_that_is_not_finite_is_refused(value: float) -> None:
    raw = np.array([[1.0, value]], "<f4").tobytes()
    with pytest.raises(ValueError, match="not finite"):
        quantise_rows(memoryview(raw), "float32", 2, INT8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd sizes; in so many shards that experts lie across two."""
    folder = tmp_path_factory.mktemp("quantised") / "checkpoint"
    return write_tiny_qwen3_moe(folder, dtype=torch.bfloat16, shard_size="20KB", **ODD)


@pytest.fixture(params=[INT8, INT4], ids=["int8", "int4"])
def quantization(request: pytest.FixtureRequest) -> Quantization:
    value: Quantization = request.param
    return value


def test_store_is_proven_to_be_the_checkpoint_quantised(
    checkpoint: Path, quantization: Quantization, tmp_path: Path
) -> None:
    extract(checkpoint, tmp_path / "store", quantised=QuantisedParts(quantization))
    assert verify(tmp_path / "store", checkpoint).num_experts == 16
    manifest = read_manifest(tmp_path / "store")
    assert (manifest.format_version, manifest.quantization) == (2, quantization)
    for record in read_expert_index(tmp_path / "store", manifest).values():
        assert record.is_contiguous and record.parts[0].offset % 4096 == 0
        raw = (tmp_path / "store" / record.parts[0].file).read_bytes()[record.parts[0].offset :]
        assert hashlib.sha256(raw[: record.nbytes]).hexdigest() == record.sha256
    shown = summarize(tmp_path / "store")
    assert (shown.dtype, shown.quantization) == (quantization.scheme, quantization.model_dump())


def test_chunks_and_shards_do_not_change_the_store(
    checkpoint: Path, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(checkpoint, tmp_path / "one", quantised=QuantisedParts(quantization))
    monkeypatch.setattr(copying, "BUFFER_BYTES", 500)
    extract(checkpoint, tmp_path / "two", quantised=QuantisedParts(quantization))
    whole = write_tiny_qwen3_moe(tmp_path / "whole", dtype=torch.bfloat16, **ODD)
    extract(whole, tmp_path / "three", quantised=QuantisedParts(quantization))
    assert store_hash(tmp_path / "one") == store_hash(tmp_path / "two") == store_hash(tmp_path / "three")


def test_killed_run_is_continued_to_the_same_store(
    checkpoint: Path, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(checkpoint, tmp_path / "undisturbed", quantised=QuantisedParts(quantization))
    add, steps = Journal.add, []
    saved = tmp_path / "saved"
    (tmp_path / "work").mkdir()

    def die_late(journal: Journal, step: str, digests: dict[str, str]) -> None:
        steps.append(step)
        if len(steps) == 8:
            shutil.copytree(tmp_path / "work", saved)
            raise KeyboardInterrupt
        add(journal, step, digests)

    monkeypatch.setattr(Journal, "add", die_late)
    with pytest.raises(KeyboardInterrupt):
        extract(checkpoint, tmp_path / "work" / "store", quantised=QuantisedParts(quantization))
    monkeypatch.setattr(Journal, "add", add)
    (tmp_path / "work").rmdir()
    saved.rename(tmp_path / "work")
    report = extract(checkpoint, tmp_path / "work" / "store", quantised=QuantisedParts(quantization))
    assert report.resumed_bytes > 0
    assert store_hash(tmp_path / "work" / "store") == store_hash(tmp_path / "undisturbed")


@pytest.mark.parametrize("part", range(6))
def test_flipped_bit_of_codes_or_scales_is_named(
    checkpoint: Path, quantization: Quantization, tmp_path: Path, part: int
) -> None:
    store = tmp_path / "store"
    extract(checkpoint, store, quantised=QuantisedParts(quantization))
    record = read_expert_index(store, read_manifest(store))[ExpertKey("model", 1, 5)]
    where = record.parts[part]
    with (store / where.file).open("r+b") as file:
        file.seek(where.offset + where.nbytes - 1)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreDiffers) as caught:
        verify(store, checkpoint)
    assert caught.value.tensor == f"model.layers.1.mlp.experts.5.{ROLES[part % 3]}_proj.weight"
    assert (caught.value.file, caught.value.offset) == (where.file, where.offset + where.nbytes - 1)


def test_safetensors_opens_the_files(checkpoint: Path, quantization: Quantization, tmp_path: Path) -> None:
    extract(checkpoint, tmp_path / "store", quantised=QuantisedParts(quantization))
    with safe_open(tmp_path / "store/experts/model-layer-0001.safetensors", "pt") as file:
        for role, scale_role, shape in zip(ROLES, SCALE_ROLES, [(35, 52), (35, 52), (52, 35)], strict=True):
            codes = file.get_tensor(f"layers.1.experts.3.{role}")
            scales = file.get_tensor(f"layers.1.experts.3.{scale_role}")
            assert tuple(codes.shape) == quantization.code_shape(shape)
            assert tuple(scales.shape) == quantization.scale_shape(shape)
            assert codes.dtype == (torch.int8 if quantization is INT8 else torch.uint8)
            assert scales.dtype == torch.bfloat16


def test_index_and_codes_that_are_quantised_already_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionRefused, match="--quantize"):
        extract(checkpoint, tmp_path / "store", index_only=True, quantised=QuantisedParts(INT8))
    whole = write_tiny_qwen3_moe(tmp_path / "whole", dtype=torch.bfloat16)
    tensors = load_file(whole / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, whole / "model.safetensors")
    with pytest.raises(TensorUnexpected, match="I8"):
        extract(whole, tmp_path / "store", quantised=QuantisedParts(INT8))
    save_file(tensors | {name: tensors[name] * math.nan}, whole / "model.safetensors")
    with pytest.raises(TensorUnexpected, match="cannot be quantised"):
        extract(whole, tmp_path / "store", quantised=QuantisedParts(INT8))
