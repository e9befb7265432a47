"""The device that a user asks for: what words mean, and why one is not there."""

from __future__ import annotations

import os

import pytest
import torch

from experts.devices import (
    CPU,
    WORKSPACE_VARIABLE,
    arithmetic_name,
    library_name,
    read_device_memory,
    resolve_device,
    settle_arithmetic,
)
from experts.errors import DeviceUnavailable
from experts.node_memory import read_node_memory


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
def test_words_mean_devices() -> None:
    words = ("cpu", "auto", "cuda", "cuda:0", "cuda:1")
    assert [str(resolve_device(word)) for word in words] == ["cpu", "cuda:0", "cuda:0", "cuda:0", "cuda:1"]


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_device() -> None:
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize("word", ["gpu", "cuda:", "cuda:x", "CUDA", "mps", ""])
def test_other_words_are_refused_with_those_that_are_known(word: str) -> None:
    with pytest.raises(DeviceUnavailable, match="must be cpu, cuda, cuda:N or auto"):
        resolve_device(word)


@pytest.mark.usefixtures("two_gpus")
def test_a_device_beyond_the_last_is_refused_with_their_number() -> None:
    with pytest.raises(DeviceUnavailable, match="PyTorch sees 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_a_cpu_build_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceUnavailable, match="is built without CUDA"):
        resolve_device("cuda")


@pytest.mark.usefixtures("no_gpu")
def test_a_cuda_build_without_device_says_what_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceUnavailable, match=r"sees no device.*CUDA_VISIBLE_DEVICES is ''"):
        resolve_device("cuda")


def test_names_are_those_of_the_class() -> None:
    assert arithmetic_name(CPU) == torch.backends.cpu.get_cpu_capability().lower()
    assert library_name(CPU) == f"torch-{torch.__version__}"


def test_arithmetic_of_cuda_is_settled_and_the_cpu_s_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    settle_arithmetic(CPU, environment)
    assert environment == {} and WORKSPACE_VARIABLE not in os.environ
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda word: None)
    settle_arithmetic(torch.device("cuda", 0), environment)
    assert environment == {WORKSPACE_VARIABLE: ":4096:8"}
    environment[WORKSPACE_VARIABLE] = ":16:8"
    settle_arithmetic(torch.device("cuda", 0), environment)
    assert environment == {WORKSPACE_VARIABLE: ":16:8"}, "the user's own choice stays"


def test_memory_of_the_cpu_is_the_node_s() -> None:
    assert read_device_memory(CPU).total_bytes == read_node_memory().total_bytes
