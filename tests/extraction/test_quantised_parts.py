"""Quantised backbones and heads: which tensors become codes, and that they are the checkpoint's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from extraction import copying
from extraction.errors import OptionRefused, StoreDiffers
from extraction.extract import extract
from extraction.manifest import Manifest, TensorEntry, read_manifest, store_hash
from extraction.quantise import Quantization, quantise_rows
from extraction.quantised_parts import QuantisedParts
from extraction.summary import summarize
from extraction.verify import verify
from tests.checkpoints import FAMILIES, write_tiny

INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
ALL_INT8 = QuantisedParts(INT8, INT8, INT8)
MIXED = QuantisedParts(None, INT8, INT4)
LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
HEAD = re.compile(r"lm_head(\.[0-9]+)?\.weight")
DECODERS = ("model", "thinker", "talker", "code_predictor")


def _entries(manifest: Manifest, component: str) -> dict[str, TensorEntry]:
    (found,) = (part for part in manifest.components if part.name == component)
    return {entry.name: entry for entry in found.tensors}


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (QuantisedParts(), None),
        (QuantisedParts(INT4), "int4-g32"),
        (QuantisedParts(backbone=INT8), "backbone-int8"),
        (QuantisedParts(INT4, INT8, INT8), "int4-g32+backbone-int8+head-int8"),
    ],
)
def test_name_says_which_parts_are_quantised(parts: QuantisedParts, name: str | None) -> None:
    assert parts.name == name


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_and_head_of_decoders_are_quantised_and_nothing_else(
    family: str, tmp_path: Path
) -> None:
    dense = {"mlp_only_layers": [0]} if family in ("qwen3_moe", "qwen2_moe") else {}
    checkpoint = write_tiny(family, tmp_path / "checkpoint", dtype=torch.bfloat16, **dense)
    extract(checkpoint, tmp_path / "plain")
    extract(checkpoint, tmp_path / "store", quantised=MIXED)
    plain, quantised = read_manifest(tmp_path / "plain"), read_manifest(tmp_path / "store")
    assert (quantised.format_version, quantised.quantised) == (3, MIXED)
    for component in plain.components:
        found = _entries(quantised, component.name)
        for entry in component.tensors:
            expected: str = entry.dtype
            if component.name in DECODERS and HEAD.fullmatch(entry.name):
                expected = "int4"
            elif (
                component.name in DECODERS and entry.name.startswith("layers.") and LINEAR.search(entry.name)
            ):
                expected = "int8"
            assert (found[entry.name].dtype, found[entry.name].shape) == (expected, entry.shape)
            if expected == entry.dtype:
                assert found[entry.name].sha256 == entry.sha256
    assert verify(tmp_path / "store", checkpoint).num_backbone_tensors == sum(
        len(component.tensors) for component in plain.components
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied head, a dense layer, sizes that no kernel takes as they are, tensors in many shards."""
    folder = tmp_path_factory.mktemp("quantised-parts") / "checkpoint"
    odd = {"hidden_size": 52, "moe_intermediate_size": 35, "intermediate_size": 38, "mlp_only_layers": [0]}
    return write_tiny(
        "qwen3_moe",
        folder,
        dtype=torch.bfloat16,
        shard_size="20KB",
        tie_word_embeddings=True,
        **odd,
    )


def test_tied_head_gets_codes_of_its_own_beside_the_embedding(checkpoint: Path, tmp_path: Path) -> None:
    extract(checkpoint, tmp_path / "store", quantised=QuantisedParts(head=INT4))
    entries = _entries(read_manifest(tmp_path / "store"), "model")
    head, embedding = entries["lm_head.weight"], entries["embed_tokens.weight"]
    assert (head.dtype, embedding.dtype) == ("int4", "bfloat16")
    assert head.source == embedding.source == "model.embed_tokens.weight"
    (values,) = (
        tensors[head.source]
        for tensors in map(load_file, sorted(checkpoint.glob("*.safetensors")))
        if head.source in tensors
    )
    raw = values.contiguous().view(torch.uint8).numpy().data
    codes, scales = quantise_rows(raw.cast("B"), "bfloat16", 52, INT4)
    written = (tmp_path / "store" / head.file).read_bytes()[head.offset :][: head.nbytes]
    assert written == bytes(codes) + bytes(scales)
    verify(tmp_path / "store", checkpoint)


def test_chunks_do_not_change_the_store(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(checkpoint, tmp_path / "one", quantised=ALL_INT8)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 500)
    extract(checkpoint, tmp_path / "two", quantised=ALL_INT8)
    assert store_hash(tmp_path / "one") == store_hash(tmp_path / "two")


@pytest.mark.parametrize("name", ["layers.1.self_attn.k_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_flipped_bit_is_named(checkpoint: Path, tmp_path: Path, name: str, part: str) -> None:
    extract(checkpoint, tmp_path / "store", quantised=ALL_INT8)
    entry = _entries(read_manifest(tmp_path / "store"), "model")[name]
    offset = entry.offset + (INT8.code_bytes(entry.shape) if part == "codes" else entry.nbytes) - 1
    with (tmp_path / "store" / entry.file).open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreDiffers) as caught:
        verify(tmp_path / "store", checkpoint)
    assert (caught.value.tensor, caught.value.offset) == (entry.source, offset)


def test_safetensors_opens_codes_and_scales(checkpoint: Path, tmp_path: Path) -> None:
    extract(checkpoint, tmp_path / "store", quantised=MIXED)
    with safe_open(tmp_path / "store/backbone/model.safetensors", "pt") as file:
        for name, shape, quantization in (
            ("layers.0.mlp.down_proj.weight", (52, 38), INT8),
            ("lm_head.weight", (512, 52), INT4),
        ):
            codes, scales = file.get_tensor(name), file.get_tensor(name + "_scale")
            assert tuple(codes.shape) == quantization.code_shape(shape)
            assert tuple(scales.shape) == quantization.scale_shape(shape)
            assert codes.dtype == (torch.int8 if quantization is INT8 else torch.uint8)
            assert scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("parts", "version", "fields"),
    [
        (QuantisedParts(), 1, set()),
        (QuantisedParts(INT8), 2, {"quantization"}),
        (
            QuantisedParts(head=INT8),
            3,
            {"quantization", "backbone_quantization", "head_quantization"},
        ),
    ],
)
def test_store_bears_the_lowest_version_that_can_say_what_it_holds(
    checkpoint: Path, tmp_path: Path, parts: QuantisedParts, version: int, fields: set[str]
) -> None:
    """Programs that know only that version read it: they refuse unknown fields."""
    extract(checkpoint, tmp_path / "store", quantised=parts)
    table = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert table["format_version"] == version
    assert {name for name in table if "quantization" in name} == fields
    assert read_manifest(tmp_path / "store").quantised == parts


def test_summary_counts_the_bytes_of_codes_and_scales(checkpoint: Path, tmp_path: Path) -> None:
    extract(checkpoint, tmp_path / "store", quantised=MIXED)
    found = summarize(tmp_path / "store")
    assert found.bytes_by_component["head"] == 512 * 52 // 2 + 2 * 512 * 2
    assert found.bytes_by_component["embeddings"] == 512 * 52 * 2
    assert found.bytes_by_component["dense"] == 3 * 52 * 38 + 2 * (2 * 38 + 52)
    assert (found.quantization, found.head_quantization) == (None, INT4.model_dump())
    assert found.backbone_quantization == INT8.model_dump()


def test_index_is_not_quantised(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionRefused, match="--quantize"):
        extract(checkpoint, tmp_path / "store", index_only=True, quantised=QuantisedParts(head=INT8))
