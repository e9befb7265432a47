"""How fast one machine is, and which bits it computes: short measurements, each bounded in bytes and time.

Rough on purpose: a plan needs to tell a laptop from a server, and a slow disk from a fast one. Called on every node by
`cluster.ray_topology`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from cluster.node_report import Arithmetic, ExpertShape
from experts.device_proof import prove_experts
from experts.devices import CPU, settle_arithmetic
from experts.errors import NotRowInvariant
from experts.numerics import RowKernel, numerics_class
from experts.worker import DTYPES

MIB = 1 << 20
BLOCK_BYTES = 4 * MIB
READERS = 4
MOST_READ_BYTES = 128 * MIB
PROBE_FILE_BYTES = 32 * MIB
"""Written where there is no store whose files could be read."""
MOST_S = 1.0
"""Of one measurement."""
WEIGHT_BYTES = 64 * MIB
"""Beyond most caches, as experts are."""


def measure_arithmetic(shape: ExpertShape, num_threads: int, device: torch.device = CPU) -> Arithmetic:
    """The class is empty where no product of this machine's library is row-invariant: it cannot serve."""
    torch.set_num_threads(num_threads)
    settle_arithmetic(device)
    try:
        kernel = prove_experts(shape.width, shape.expert_width, DTYPES[shape.dtype], device)
    except NotRowInvariant:
        return Arithmetic("", "", 0.0)
    name = numerics_class(device, DTYPES[shape.dtype], kernel)
    return Arithmetic(name, _digest(kernel, shape), _product_rate(kernel, shape))


def _digest(kernel: RowKernel, shape: ExpertShape) -> str:
    """Of products of numbers that every machine makes alike."""
    dtype = DTYPES[shape.dtype]
    x = _numbers(8, shape.width, 40503).to(kernel.device, dtype)
    weight = _numbers(2 * shape.expert_width, shape.width, 48271).to(kernel.device, dtype)
    bits = kernel.linear(x, weight).contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:12]


def _numbers(rows: int, columns: int, factor: int) -> torch.Tensor:
    """In [-1, 1), by whole numbers and one exact division, so that no library's random numbers matter."""
    counted = torch.arange(1, rows * columns + 1, dtype=torch.int64)
    return ((counted * factor % 65521) - 32768).float().div_(32768.0).view(rows, columns)


def _product_rate(kernel: RowKernel, shape: ExpertShape) -> float:
    """Of one row after another through more weights than caches hold."""
    dtype = DTYPES[shape.dtype]
    outputs = max(1, WEIGHT_BYTES // (shape.width * dtype.itemsize))
    weight = torch.ones(outputs, shape.width, dtype=dtype).to(kernel.device)
    row = torch.ones(1, shape.width, dtype=dtype).to(kernel.device)
    kernel.linear(row, weight)  # pages and threads come to life
    return best_rate(
        lambda: kernel.linear(row, weight)[0, 0].item(), weight.nbytes
    )  # read: a card does not wait


def best_rate(work: Callable[[], object], num_bytes: int, most_s: float = MOST_S) -> float:
    """Bytes a second of the fastest of some runs, within a time; others use the machine, too."""
    ends = time.perf_counter() + most_s
    best = float("inf")
    while True:
        started = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= ends:
            return num_bytes / max(best, 1e-9)


def measure_disk(files: Iterable[Path], folder: Path) -> float:
    """Bytes a second past the page cache, from files of a store, or from one that is written for it in `folder`.

    Returns 0 where nothing can be read.
    """
    readable = [path for path in files if path.is_file() and path.stat().st_size >= BLOCK_BYTES]
    with suppress(OSError):
        if readable:
            return _read_rate(readable)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-probe-") as file:
            for _ in range(PROBE_FILE_BYTES // BLOCK_BYTES):
                file.write(os.urandom(BLOCK_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return _read_rate([Path(file.name)])
    return 0.0


def _read_rate(paths: Iterable[Path]) -> float:
    places = [
        (path, offset)
        for path in paths
        for offset in range(0, path.stat().st_size - BLOCK_BYTES + 1, BLOCK_BYTES)
    ][: MOST_READ_BYTES // BLOCK_BYTES]
    ends = time.perf_counter() + MOST_S
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as readers:
        num_bytes = sum(readers.map(partial(_read_block, ends), places))
    return num_bytes / max(time.perf_counter() - started, 1e-9)


def _read_block(ends: float, place: tuple[Path, int]) -> int:
    """Into a page-aligned buffer, as O_DIRECT wants it; where the file system has none, its cache is emptied first."""
    if time.perf_counter() > ends:
        return 0
    path, offset = place
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, offset, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as buffer, memoryview(buffer) as view:
            return os.preadv(descriptor, [view], offset)
    finally:
        os.close(descriptor)
