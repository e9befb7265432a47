"""`bench_device` runs through with a tiny model on the CPU; without a GPU the command says what it needs."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import bench_device
from benchmarks.device_rates import ExpertShape, spread_call
from benchmarks.peer_models import PeerModel
from experts.devices import CPU


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeerModel:
    return PeerModel(tmp_path_factory.mktemp("bench"), "qwen3_moe", 2, is_tiny=True)


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "why_no_cuda", lambda: "PyTorch is built without CUDA")
    monkeypatch.setattr(sys, "argv", ["bench_device"])
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU .* built without CUDA"):
        bench_device.main()


def test_link_and_products_are_measured_against_the_device_s_own_rates(model: PeerModel) -> None:
    found = bench_device.measure(CPU, model, ("link", "experts"), bench_device.QUICK)
    assert min(found["link"].values()) > 0
    products = [part for name, part in found["experts"].items() if "tokens" in name]
    assert products and all(part["bandwidth_share"] > 0 and part["matmul_share"] > 0 for part in products)


@pytest.mark.slow
def test_decoding_and_tiers_are_measured(model: PeerModel) -> None:
    found = bench_device.measure(CPU, model, ("decode", "tiers"), bench_device.QUICK)
    assert found["decode"]["1 streams"]["ratio"] > 0
    assert all(found["tiers"][form]["seconds_a_token"] > 0 for form in bench_device.FORMS)


def test_a_call_spreads_tokens_over_experts_evenly() -> None:
    shape = ExpertShape(16, 4, 8, 4)
    call = spread_call(shape, torch.zeros(8, 8))
    call.validate()
    assert (call.experts, set(call.counts)) == (tuple(range(16)), {2})
