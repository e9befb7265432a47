"""How fast this machine's cores read memory together: what a step that reads every weight once cannot beat.

A small C loop sums a buffer, one thread for each core, where a compiler is at hand; else the fastest of PyTorch's own
reductions, which stays below. The answer says which it was.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

BUFFER_BYTES = 1 << 30
"""Beyond what any processor's caches hold."""
REPEATS = 7
MATMUL_SIZE = 2048
SOURCE = """
#include <stdint.h>
uint64_t one_stream(const uint64_t *x, int64_t n) {
    uint64_t s[32] = {0}, total = 0;
    for (int64_t i = 0; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; j++) s[j] += x[i + j];
    for (int j = 0; j < 32; j++) total += s[j];
    return total;
}
uint64_t four_streams(const uint64_t *x, int64_t n) {
    uint64_t s[32] = {0}, total = 0;
    int64_t quarter = n / 4;
    for (int64_t i = 0; i + 8 <= quarter; i += 8)
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 8; j++) s[8 * k + j] += x[k * quarter + i + j];
    for (int j = 0; j < 32; j++) total += s[j];
    return total;
}
"""
LOOPS = ("one_stream", "four_streams")
"""Which is faster differs between processors."""


@dataclass(frozen=True)
class Bandwidth:
    """Of all the given cores together."""

    bytes_per_s: float
    how: str


def read_bandwidth(num_threads: int) -> Bandwidth:
    """The best of some reads of a large buffer: what the memory gives when nobody disturbs it."""
    words = np.ones(BUFFER_BYTES // 8, dtype=np.uint64)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is not None:
        with tempfile.TemporaryDirectory(prefix="bandwidth-") as folder:
            reads = _compile(compiler, Path(folder))
            rate = max(_rate(read, words, num_threads) for read in reads)
        return Bandwidth(rate, f"a C loop, {num_threads} threads")
    torch.set_num_threads(num_threads)
    values = torch.from_numpy(words.view(np.int64))
    rate = max(_rate_once(lambda: values.sum()), _rate_once(lambda: values.max()))
    return Bandwidth(rate, "a reduction of PyTorch (no C compiler here); the memory is faster")


def matmul_flops_per_s(dtype: torch.dtype) -> float:
    """Of a large product, with the threads that are set."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    b = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    samples = []
    for _ in range(REPEATS):
        started = perf_counter()
        torch.mm(a, b)
        samples.append(2 * MATMUL_SIZE**3 / (perf_counter() - started))
    return max(samples)


def _compile(compiler: str, folder: Path) -> list[Callable[[int, int], int]]:
    source, library = folder / "sum.c", folder / "sum.so"
    source.write_text(SOURCE)
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    loaded = ctypes.CDLL(str(library))
    reads = [loaded[name] for name in LOOPS]
    for read in reads:
        read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    return list(reads)


def _rate(
    read: Callable[[int, int], int], words: np.ndarray[tuple[int], np.dtype[np.uint64]], num_threads: int
) -> float:
    parts = np.array_split(words, num_threads)
    samples = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(REPEATS):
            started = perf_counter()
            sums = pool.map(lambda part: read(part.ctypes.data, part.size), parts)
            if sum(sums) != words.size:
                raise RuntimeError("the loop did not read every word")
            samples.append(words.nbytes / (perf_counter() - started))
    return max(samples)


def _rate_once(read: Callable[[], object]) -> float:
    samples = []
    for _ in range(REPEATS):
        started = perf_counter()
        read()
        samples.append(BUFFER_BYTES / (perf_counter() - started))
    return max(samples)
