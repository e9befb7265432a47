"""Memory figures against sums made by hand from the files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from extraction.errors import ManifestInvalid
from extraction.extract import extract
from extraction.manifest import MANIFEST_NAME
from extraction.summary import summarize


def test_totals_are_those_of_the_files(stories_store: Path) -> None:
    summary = summarize(stories_store)
    expert = 3 * 48 * 256 * 2
    backbone = sum(nbytes for name, nbytes in summary.bytes_by_component.items() if name != "experts")
    assert (summary.num_layers, summary.num_moe_layers, summary.experts_per_layer) == (6, 6, 64)
    assert (summary.expert_bytes, summary.num_experts) == (expert, 384)
    assert summary.bytes_by_component["embeddings"] == 4096 * 256 * 2
    assert summary.bytes_by_component["head"] == 0
    assert summary.bytes_by_component["experts"] == 384 * expert
    by_state = {total.state: total.total_bytes for total in summary.totals}
    assert by_state == {
        "WAKE (k=4, reduced)": backbone + 6 * 4 * expert,
        "FOCUS (k=8, native)": backbone + 6 * 8 * expert,
        "CRISIS (k=16)": backbone + 6 * 16 * expert,
        "all experts": backbone + 384 * expert,
    }


def test_memory_table_leads_with_the_whole_process(stories_store: Path) -> None:
    summary = summarize(stories_store)
    first, *parts, last_layer = summary.memory_table
    assert first.component == "whole process"
    assert first.monolithic_bytes == sum(row.monolithic_bytes for row in parts)
    assert first.selective_bytes == sum(row.selective_bytes for row in parts)
    assert 0.75 < first.reduction < last_layer.reduction == 0.875


def test_summary_is_plain_json(tiny_store: Path) -> None:
    text = json.dumps(summarize(tiny_store).as_json())
    assert json.loads(text)["num_moe_layers"] == 2


def test_experts_of_two_dtypes_are_counted_by_their_own_sizes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Totals hold for the largest choice of experts, and add up to the bytes of the files."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if ".layers.2.mlp.experts.0." in name or ".layers.2.mlp.experts.1." in name:
            tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, checkpoint / "model.safetensors")
    extract(checkpoint, tmp_path / "store")
    summary = summarize(tmp_path / "store")
    elements = 3 * 24 * 64
    assert summary.dtype == "bfloat16, float32"
    assert summary.expert_bytes == elements * 4
    assert summary.bytes_by_component["experts"] == elements * (14 * 4 + 2 * 2)
    backbone = sum(nbytes for name, nbytes in summary.bytes_by_component.items() if name != "experts")
    assert summary.totals[-1].total_bytes == backbone + elements * (14 * 4 + 2 * 2)
    assert summary.memory_table[0].monolithic_bytes == summary.totals[-1].total_bytes
    native = next(total for total in summary.totals if "native" in total.state)
    assert native.expert_bytes == 2 * 2 * elements * 4


@pytest.mark.parametrize(
    "damage",
    [
        {"num_hidden_layers": None},
        {"num_hidden_layers": "3"},
        {"num_hidden_layers": 10**30},
        {"num_experts_per_tok": True},
        {"num_experts_per_tok": 9},
    ],
)
def test_damaged_configuration_is_refused(tiny_store: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    table = json.loads((store / MANIFEST_NAME).read_text())
    table["components"][0]["config"].update(damage)
    (store / MANIFEST_NAME).write_text(json.dumps(table))
    with pytest.raises(ManifestInvalid, match=next(iter(damage))):
        summarize(store)


def test_manifest_without_components_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    table = json.loads((store / MANIFEST_NAME).read_text())
    table["components"] = []
    (store / MANIFEST_NAME).write_text(json.dumps(table))
    with pytest.raises(ManifestInvalid, match="no experts"):
        summarize(store)


def test_files_that_a_broken_copy_has_left_short_are_named(stories_store: Path, tmp_path: Path) -> None:
    assert summarize(stories_store).files_cut_short == ()
    store = Path(shutil.copytree(stories_store, tmp_path / "store"))
    first, second, *_ = sorted((store / "experts").iterdir())
    os.truncate(first, 100_000)
    second.unlink()
    assert summarize(store).files_cut_short == (f"experts/{first.name}", f"experts/{second.name}")
