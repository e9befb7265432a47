"""The device that computes: what a user may ask for, what decides its bits, and the way of small tensors to it.

Knows PyTorch's `cpu` and `cuda`. Called by `experts.numerics`, `router.loading` and the gateway's commands.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from experts.errors import DeviceUnavailable
from experts.node_memory import NodeMemory, read_node_memory

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ADVICE = "must be cpu, cuda, cuda:N or auto"
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"
"""Of cuBLAS, with which NVIDIA promises the same bits from call to call."""
_CUDA = re.compile(r"cuda(?::([0-9]{1,3}))?")


def resolve_device(word: str, option: str = "device") -> torch.device:
    """`cpu`, `cuda` (the first), `cuda:N`, or `auto`: CUDA where PyTorch sees a device, else the CPU. option: by which
    it was asked for.

    Raises DeviceUnavailable, which says why.
    """
    if word == "cpu":
        return CPU
    if word == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    asked = _CUDA.fullmatch(word)
    if asked is None:
        raise DeviceUnavailable(word[:40], ADVICE, option)
    index, reason = int(asked[1] or 0), why_no_cuda()
    if reason is not None:
        raise DeviceUnavailable(word, reason, option)
    if index >= torch.cuda.device_count():
        reason = f"PyTorch sees {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        raise DeviceUnavailable(word, reason, option)
    return torch.device("cuda", index)


def why_no_cuda() -> str | None:
    """Why nothing can be computed on CUDA here; None where it can."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a CUDA build of PyTorch"
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        return f"PyTorch {torch.__version__} for CUDA {torch.version.cuda} sees no device{shown}"
    return None


def settle_arithmetic(device: torch.device, environment: MutableMapping[str, str] = os.environ) -> None:
    """Rule out what would let a device choose other roundings: to be called before it multiplies for the first time."""
    if device.type != "cuda":
        return
    environment.setdefault(WORKSPACE_VARIABLE, WORKSPACE)
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def arithmetic_name(device: torch.device) -> str:
    """What selects a device's kernels, as a short name: cuBLAS goes by compute capability and multiprocessors."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().lower()
    if device.type != "cuda":
        return device.type
    facts = torch.cuda.get_device_properties(device)
    return f"sm{facts.major}{facts.minor}x{facts.multi_processor_count}"


def library_name(device: torch.device) -> str:
    """PyTorch's version, on CUDA with that of the cuBLAS in this process."""
    name = f"torch-{torch.__version__}"
    return f"{name}-cublas-{_cublas_version() or torch.version.cuda}" if device.type == "cuda" else name


def read_device_memory(device: torch.device) -> NodeMemory:
    """Of a CUDA device; of another, which has no memory of its own, the node's."""
    if device.type != "cuda":
        return read_node_memory()
    free, total = torch.cuda.mem_get_info(device)
    return NodeMemory(total, free)


def read_cards() -> tuple[NodeMemory, ...]:
    """Of every CUDA device that PyTorch sees."""
    return tuple(
        read_device_memory(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
    )


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without waiting for what is computed there.

    Memory that is not pinned is copied away before this returns, so that the host's tensor may change at once.
    """
    return tensor.to(device, non_blocking=True)


@functools.cache
def _cublas_version() -> str | None:
    """Of the library that PyTorch has loaded; None where it does not tell."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in dict.fromkeys(re.findall(r"(/\S*libcublas\.so\S*)$", mapped, re.MULTILINE)):
        value = ctypes.c_int()
        numbers = []
        try:
            library = ctypes.CDLL(path)
            for part in range(3):  # major, minor, patch
                library.cublasGetProperty(part, ctypes.byref(value))
                numbers.append(str(value.value))
        except (AttributeError, OSError):
            continue
        return ".".join(numbers)
    return None
