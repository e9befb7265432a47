"""docs/store-format.md: what it promises other programs holds, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from experts.hash_log import LOG_NAME
from experts.store import ExpertStore
from extraction.expert_index import INDEX_NAME
from extraction.extract import extract
from extraction.manifest import Component, ExpertKey, FileEntry, Manifest, TensorEntry
from extraction.plan import SMALL_FILES
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from tests.conftest import REPOSITORY

DOCUMENT = (REPOSITORY / "docs/store-format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("index_only", [False, True])
def test_example_computes_an_expert(stories_checkpoint: Path, tmp_path: Path, index_only: bool) -> None:
    extract(stories_checkpoint, tmp_path / "store", index_only=index_only)
    (tmp_path / "read_expert.py").write_text(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0])
    command = [sys.executable, "read_expert.py", "store", "model", "3", "17"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shapes, _, total = done.stdout.strip().rpartition(" ")
    assert shapes == "(48, 256) (48, 256) (256, 48)"
    raw = ExpertStore.open(tmp_path / "store").read_expert(ExpertKey("model", 3, 17)).view(torch.bfloat16)
    gate, up, down = raw.float().split(48 * 256)
    x = torch.ones(256)
    hidden = torch.nn.functional.silu(gate.view(48, 256) @ x) * (up.view(48, 256) @ x)
    # The sums run in another order: a few units of float32's last place.
    assert float(total) == pytest.approx(float((down.view(256, 48) @ hidden).abs().sum()), rel=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_example_computes_a_quantised_expert(stories_checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    """Like the one as published, as far as the quantisation goes."""
    quantization = Quantization.model_validate(
        {"scheme": scheme, "group_size": 64 if scheme == "int4" else None}
    )
    extract(stories_checkpoint, tmp_path / "plain")
    extract(stories_checkpoint, tmp_path / "quantised", quantised=QuantisedParts(quantization))
    (tmp_path / "read_expert.py").write_text(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0])
    totals = []
    for store in ("plain", "quantised"):
        command = [sys.executable, "read_expert.py", store, "model", "3", "17"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        shapes, _, total = done.stdout.strip().rpartition(" ")
        assert shapes == "(48, 256) (48, 256) (256, 48)"
        totals.append(float(total))
    assert totals[1] == pytest.approx(totals[0], rel=0.2 if scheme == "int4" else 0.02)
    assert totals[1] != totals[0]


def test_every_field_and_file_is_described() -> None:
    for model in (Manifest, Quantization, Component, TensorEntry, FileEntry):
        for name in model.model_fields:
            assert f"`{name}`" in DOCUMENT
    for name in (*SMALL_FILES, LOG_NAME):
        assert name in DOCUMENT


def test_index_has_the_columns_of_the_document(tiny_store: Path) -> None:
    written = str(pq.ParquetFile(tiny_store / INDEX_NAME).schema)
    columns = re.findall(r"(required|optional|repeated) (\w+) (?:field_id=-1 )?(\w+)", written)
    block = next(text for text in re.findall(r"```\n(.*?)```", DOCUMENT, re.DOTALL) if "component" in text)
    described = re.findall(r"^ *(required|optional|repeated) (\w+) +(\w+)", block, re.MULTILINE)
    assert described == [column for column in columns if column[2] != "schema"]
    assert b"ARROW:schema" not in (tiny_store / INDEX_NAME).read_bytes()


def test_padding_is_zeros_before_an_unaligned_record(sharded: Path, tmp_path: Path) -> None:
    extract(sharded, tmp_path / "store")
    with safe_open(tmp_path / "store/experts/model-layer-0000.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        paddings = [name for name in file.keys() if name.startswith("padding.")]  # noqa: SIM118 - no mapping
        assert paddings
        for name in paddings:
            padding = file.get_tensor(name)
            assert padding.dtype == torch.uint8
            assert 0 < padding.numel() < 4096
            assert not padding.any()
