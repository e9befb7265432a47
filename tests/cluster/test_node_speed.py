"""Measurements of one machine: bounded, and of the right kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster import node_speed
from cluster.node_report import ExpertShape
from cluster.node_speed import BLOCK_BYTES, best_rate, measure_arithmetic, measure_disk
from tests.simulated_device import DEVICE, simulated

SMALL = ExpertShape(64, 48, "float32")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_speed, "MOST_S", 0.05)


def test_one_machine_computes_the_same_bits_twice_and_with_any_threads() -> None:
    threads = torch.get_num_threads()
    try:
        first, second = measure_arithmetic(SMALL, 1), measure_arithmetic(SMALL, 2)
    finally:
        torch.set_num_threads(threads)
    assert (first.numerics_class, first.digest) == (second.numerics_class, second.digest)
    assert "/float32/" in first.numerics_class
    assert first.expert_bytes_s > 0


def test_another_dtype_computes_other_bits() -> None:
    other = ExpertShape(64, 48, "bfloat16")
    assert measure_arithmetic(SMALL, 1).digest != measure_arithmetic(other, 1).digest


def test_a_device_is_measured_by_the_same_numbers() -> None:
    with simulated():
        found = measure_arithmetic(SMALL, 1, DEVICE)
    assert found.numerics_class.startswith(f"{DEVICE.type}/")
    assert found.expert_bytes_s > 0 and found.digest


def test_disk_is_measured_with_the_store_s_files_or_with_one_that_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    assert measure_disk([], folder) > 0
    assert not list(folder.iterdir())
    file = tmp_path / "shard"
    file.write_bytes(bytes(2 * BLOCK_BYTES))
    assert measure_disk([file, tmp_path / "none"], tmp_path / "unused") > 0


def test_disk_that_cannot_be_read_or_written_has_no_rate(tmp_path: Path) -> None:
    assert measure_disk([tmp_path / "none"], tmp_path / "no folder") == 0.0


def test_rate_is_of_the_fastest_run() -> None:
    assert best_rate(lambda: None, 1000, most_s=0.0) > 1000
