"""Conversions against torch, over every bit pattern of the narrow dtypes and many of the wide one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experts.store import ExpertStore
from extraction.dtypes import convert
from extraction.errors import TensorUnexpected
from extraction.extract import extract
from extraction.manifest import ROLES

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _patterns(dtype: str) -> torch.Tensor:
    """Every value of a narrow dtype; of float32, all upper halves with lower halves around the ties."""
    narrow = np.arange(1 << 16, dtype=np.uint16)
    if dtype != "float32":
        return torch.from_numpy(narrow.view(np.int16).copy()).view(TORCH[dtype])
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    wide = (narrow.astype(np.uint32)[:, None] << 16) | np.array(lower, np.uint32)
    return torch.from_numpy(wide.reshape(-1).view(np.int32).copy()).view(torch.float32)


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
def test_every_value_becomes_what_torch_makes_of_it(source: str, target: str) -> None:
    values = _patterns(source)
    expected = values.to(TORCH[target])
    is_overflow = torch.isinf(expected) & torch.isfinite(values)
    raw = memoryview(values[~is_overflow].contiguous().view(torch.uint8).numpy()).cast("B")
    found = torch.frombuffer(bytearray(convert(raw, source, target)), dtype=TORCH[target])
    expected = expected[~is_overflow]
    is_nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(found), is_nan)
    bits = torch.int32 if target == "float32" else torch.int16
    assert torch.equal(found.view(bits)[~is_nan], expected.view(bits)[~is_nan])


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        (70000.0, "float32", "float16"),
        (-(2.0**100), "bfloat16", "float16"),
        (3.4e38, "float32", "bfloat16"),
    ],
)
def test_value_beyond_the_narrow_range_is_refused(value: float, source: str, target: str) -> None:
    raw = memoryview(torch.tensor([1.0, value], dtype=TORCH[source]).view(torch.uint8).numpy()).cast("B")
    with pytest.raises(OverflowError, match=target):
        convert(raw, source, target)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_converted_store_holds_converted_tensors_under_their_own_hashes(
    sharded: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extraction.copying.BUFFER_BYTES", 4096)  # several chunks a tensor
    extract(sharded, tmp_path / "store", dtype=dtype)  # type: ignore[arg-type]
    source: dict[str, torch.Tensor] = {}
    for shard in sharded.glob("*.safetensors"):
        source |= load_file(shard)
    store = ExpertStore.open(tmp_path / "store")
    for key in store.expert_keys():
        names = [f"model.layers.{key.layer}.mlp.experts.{key.expert}.{role}_proj.weight" for role in ROLES]
        expected = torch.cat([source[name].to(TORCH[dtype]).reshape(-1) for name in names])
        assert torch.equal(store.read_expert(key).view(TORCH[dtype]), expected)
    for entry in store.component("model").tensors:
        assert torch.equal(store.read_tensor("model", entry.name), source[entry.source].to(TORCH[dtype]))
    store.close()


def test_checkpoint_that_does_not_fit_the_dtype_is_refused_by_tensor(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shard = min(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    name = max(tensors)
    tensors[name].view(-1)[3] = 1e5
    save_file(tensors, shard)
    with pytest.raises(TensorUnexpected, match="beyond the range of float16") as caught:
        extract(copy, tmp_path / "store", dtype="float16")
    assert caught.value.name == name
    assert not (tmp_path / "store").exists()
