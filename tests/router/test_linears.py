"""Quantised backbones and heads in memory: against the same values in full precision, and to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts import quantised
from experts.errors import StoreDamaged
from experts.native_products import TORCH, VARIABLE
from experts.packed_matrix import CanonicalMatrix, PackedMatrix, pack
from experts.quantised import planned_product, product_suffix
from experts.store import ExpertStore
from extraction.extract import extract
from extraction.quantise import Quantization, quantise_rows
from extraction.quantised_parts import QuantisedParts
from router.footprint import backbone_bytes, measure_footprint
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from tests.checkpoints import write_tiny
from tests.engines import KV_BUDGET_BYTES, open_engine, run_to_end

INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared and dense, biases": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "odd sizes, tied head": (
        "qwen3_moe",
        {"hidden_size": 52, "intermediate_size": 38, "mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, sizes = MODELS[str(request.param)]
    return write_tiny(family, tmp_path_factory.mktemp("linears") / "checkpoint", **sizes)


@pytest.fixture(scope="module", params=[INT8, INT4], ids=["int8", "int4"])
def quantization(request: pytest.FixtureRequest) -> Quantization:
    value: Quantization = request.param
    return value


@pytest.fixture(scope="module")
def store(checkpoint: Path, quantization: Quantization, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linears-store") / "store"
    extract(checkpoint, root, quantised=QuantisedParts(None, quantization, quantization))
    return root


def _values_of_codes(matrix: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """What a matrix's codes and scales stand for, in float32."""
    raw = memoryview(matrix.contiguous().numpy()).cast("B")
    codes, scales = quantise_rows(raw, "float32", matrix.shape[1], quantization)
    shape = tuple(matrix.shape)
    return CanonicalMatrix(
        torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(quantization.code_shape(shape)),
        torch.frombuffer(bytearray(scales), dtype=torch.bfloat16).view(quantization.scale_shape(shape)),
        shape[1],
        quantization,
    ).dequantised()


def _logits(root: Path, ids: Sequence[int]) -> torch.Tensor:
    loaded = open_engine(root, EngineOptions(dtype="float32"))
    request = GenerationRequest("r", tuple(ids), SamplingParams(max_tokens=1, temperature=0))
    (logits_V,) = run_to_end(loaded.engine, [request]).logits["r"]
    loaded.close()
    return logits_V


def test_logits_are_those_of_the_same_values_in_full_precision(
    checkpoint: Path, store: Path, quantization: Quantization, tmp_path: Path
) -> None:
    """The other checkpoint has, in float32, what codes and scales stand for, and a head apart from its embedding.
    Tolerance: that of docs/exactness.md across classes."""
    shutil.copytree(checkpoint, tmp_path / "dequantised")
    file = tmp_path / "dequantised" / "model.safetensors"
    tensors = load_file(file)
    tensors.setdefault(HEAD, tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        is_linear = name.endswith("_proj.weight") and ".experts." not in name
        if is_linear or name == HEAD:
            tensors[name] = _values_of_codes(tensor, quantization)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "dequantised" / "config.json").read_text())
    (tmp_path / "dequantised" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    extract(tmp_path / "dequantised", tmp_path / "store")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected, found = _logits(tmp_path / "store", ids), _logits(store, ids)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backbone_is_counted_to_the_byte_before_it_is_read(store: Path, dtype: str) -> None:
    options = EngineOptions(dtype=dtype, kv_budget_bytes=KV_BUDGET_BYTES)
    loaded = open_engine(store, options)
    backbone = loaded.engine.backbone
    assert measure_footprint(loaded.store, options).backbone_bytes == backbone.nbytes
    weights = [layer.qkv_OD for layer in backbone.layers] + [layer.output_DO for layer in backbone.layers]
    weights += [backbone.head_VD]
    for layer in backbone.layers:
        gated = layer.dense or (layer.moe and layer.moe.shared and layer.moe.shared.weights)
        weights += [gated.gate_up_FD, gated.down_DF] if gated else []
    for weight in weights:
        assert isinstance(weight, PackedMatrix)
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (weight.codes, weight.scales)
        }
        assert sum(held.values()) == weight.nbytes
    loaded.close()


def test_class_names_the_parts_and_actors_are_told_of_experts_only(
    store: Path, quantization: Quantization
) -> None:
    loaded = open_engine(store, EngineOptions(dtype="float32"))
    name = quantization.name
    product = product_suffix(quantization, planned_product(torch.float32)).removeprefix("/")
    assert loaded.numerics_class == (f"{loaded.worker.numerics_class}/backbone-{product}/head-{product}")
    assert name not in loaded.worker.numerics_class
    loaded.close()


def test_wrong_packing_is_noticed_and_codes_are_dequantised_instead(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled(matrix: CanonicalMatrix, dtype: torch.dtype) -> PackedMatrix:
        packed = pack(matrix, dtype)
        flipped = packed.codes.flip(1).contiguous()
        return PackedMatrix(packed.shape, packed.quantization, flipped, packed.scales, None)

    monkeypatch.setenv(VARIABLE, TORCH)
    expected = _logits(store, [3, 1, 4])
    monkeypatch.setattr(quantised, "pack", shuffled)
    loaded = open_engine(store, EngineOptions(dtype="float32"))
    assert loaded.numerics_class.endswith("/dequantise-1")
    counted = backbone_bytes(loaded.store.served, loaded.config, loaded.dtype, loaded.forms)
    assert loaded.engine.backbone.nbytes == counted
    loaded.close()
    found = _logits(store, [3, 1, 4])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_store_whose_head_is_not_quantised_as_it_says_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    extract(checkpoint, tmp_path / "store")
    file = tmp_path / "store" / "manifest.json"
    said = {"format_version": 3, "head_quantization": INT8.model_dump(mode="json")}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(StoreDamaged, match="lm_head"):
        open_engine(tmp_path / "store", EngineOptions())


def test_altered_scale_is_refused_when_it_is_read(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    opened = ExpertStore.open(tmp_path / "store")
    entry = next(tensor for tensor in opened.served.tensors if tensor.name == HEAD)
    opened.close()
    with (tmp_path / "store" / entry.file).open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - 1)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreDamaged, match=r"lm_head.weight.*was altered"):
        open_engine(tmp_path / "store", EngineOptions())
