"""What one machine is: versions, limits, memory, disk, devices. Plain values, and the thin reading of them.

Needs no Ray that runs. Called on this machine by `sage-moe doctor` and `sage-moe join`, and on every node of a
cluster by `cluster.ray_topology`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from cluster.topology import Gpu
from experts.cores import num_cores
from experts.errors import ProductsUnavailable
from experts.node_memory import NodeMemory, read_node_memory
from experts.store_source import STORE_CACHE_VARIABLE

DEFAULT_STORE_CACHE = Path(".cache") / "sage-moe" / "records"
SHARED_MEMORY = Path("/dev/shm")
PACKAGES = ("extraction", "experts", "router", "cluster", "gateway")
SOURCE_SUFFIXES = (".py", ".c", ".h")
UNKNOWN = "none"


@dataclass(frozen=True)
class Versions:
    """What must be equal on all nodes. code: a digest of our own packages, since wheels of one version may differ."""

    sage_moe: str
    code: str
    ray: str
    python: str
    torch: str


@dataclass(frozen=True)
class MachineFacts:
    """One machine, as seen from one of its processes."""

    name: str
    versions: Versions
    num_cores: int
    open_files: int
    """How many files a process may have open; `open_files_most` is how far it may raise that itself."""
    open_files_most: int
    memory: NodeMemory
    machine_bytes: int
    """Of memory, whatever limit this process has."""
    shared_free_bytes: int | None
    """Of /dev/shm, where Ray's object store lies; None where there is none."""
    cache_folder: str
    cache_free_bytes: int
    is_cache_writable: bool
    gpus: tuple[Gpu, ...] = ()
    products: str = ""
    """Level of our own matrix products; nothing where PyTorch's are used."""
    products_problem: str = ""
    """What is wrong with the choice of them."""


def read_machine(environment: Mapping[str, str] = os.environ) -> MachineFacts:
    """This machine. Imports Torch, which takes a second, for its devices."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cache_folder = store_cache_folder(environment)
    level, problem = _read_products(environment)
    existing = next(path for path in (cache_folder, *cache_folder.parents) if path.exists())
    return MachineFacts(
        platform.node() or "localhost",
        read_versions(),
        num_cores(),
        _bounded(soft),
        _bounded(hard),
        read_node_memory(),
        psutil.virtual_memory().total,
        _free_bytes(SHARED_MEMORY),
        str(cache_folder),
        _free_bytes(existing) or 0,
        existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        read_gpus(),
        level,
        problem,
    )


def store_cache_folder(environment: Mapping[str, str]) -> Path:
    """Where this machine keeps copies of expert records."""
    named = environment.get(STORE_CACHE_VARIABLE)
    return Path(named).absolute() if named else Path.home() / DEFAULT_STORE_CACHE


def read_versions() -> Versions:
    """Without importing any of them."""
    packages = (_version(name) for name in ("sage-moe", "ray", "torch"))
    sage_moe, ray, torch = packages
    return Versions(sage_moe, code_digest(), ray, platform.python_version(), torch)


def read_gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Gpu(device.name, device.total_memory) for device in devices)


def _read_products(environment: Mapping[str, str]) -> tuple[str, str]:
    import torch

    from experts.native_products import chosen_level

    try:
        return chosen_level(torch.bfloat16, environment) or "", ""
    except ProductsUnavailable as error:
        return "", str(error)


@cache
def code_digest() -> str:
    """Of the packages' modules and C sources on this machine's disk; equal where the same code runs."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(p for p in (root / package).glob("**/*") if p.suffix in SOURCE_SUFFIXES):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN


def _bounded(limit: int) -> int:
    return 2**31 if limit == resource.RLIM_INFINITY else limit


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
