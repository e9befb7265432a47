"""How fast are products with int8 and int4 matrices, against bfloat16, for one row and for a prompt's hundreds?

The matrices of one decoder layer of Qwen3-30B-A3B and its head, at full width, as the engine holds them: bfloat16,
packed int8, packed int4 (groups of 32), and each of the two dequantised for every product. Contenders take turns; so
many copies of each matrix are used in turn that weights come from memory and not from the processor's caches. A decode
step has 1 or 8 rows at the backbone, a prompt 64 or 512; an expert gets fewer of them (4 of 64, 32 of 512 where 128
share 8 uses a row evenly). Reported: milliseconds, the ratio to bfloat16 of the same turn (below 1 is faster), and
gigabytes of weights a second.

It also says whether a packed product has the bits of the dequantised one: only then could a prompt take the latter.

Usage: python -m benchmarks.bench_quantised [--turns N] [--rows N ...] [--matrix NAME ...] [--keep]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import finish, spread
from experts.numerics import RowKernel, calibrate, num_cores
from experts.packed_matrix import CanonicalMatrix, Weight, keep, linear, pack
from extraction.quantise import INT4_LIMIT, INT8_LIMIT, Quantization

MATRICES = {
    "expert gate and up": (1536, 2048),
    "expert down": (2048, 768),
    "attention q, k, v": (5120, 2048),
    "attention output": (2048, 4096),
    "head": (151936, 2048),
}
"""(outputs, inputs)."""
ROWS = (1, 8, 64, 512)
HEAD_ROWS = (1, 8)
"""Only rows whose logits are wanted reach the head."""
SCHEMES = {
    "int8": Quantization(scheme="int8", group_size=None),
    "int4": Quantization(scheme="int4", group_size=32),
}
CACHE_BYTES = 256 << 20
"""Beyond what any processor's caches hold; the copies of a bfloat16 matrix together are larger."""
MAX_COPIES = 64
DTYPE = torch.bfloat16
WARM_TURNS = 2


@dataclass(frozen=True)
class Contender:
    """One form of a matrix, in several copies that are used in turn."""

    weights: list[Weight]
    kernel: RowKernel

    def run(self, turn: int, x_RI: Tensor) -> Tensor:
        return linear(self.kernel, x_RI, self.weights[turn % len(self.weights)])

    @property
    def nbytes(self) -> int:
        return self.weights[0].nbytes


def contenders(shape: tuple[int, int], kernel: RowKernel) -> dict[str, Contender]:
    num_copies = max(1, min(MAX_COPIES, CACHE_BYTES // (2 * shape[0] * shape[1])))
    generator = torch.Generator().manual_seed(0)

    def copies(make: Callable[[], Weight]) -> Contender:
        return Contender([make() for _ in range(num_copies)], kernel)

    def plain() -> Weight:
        weight = torch.empty(shape, dtype=DTYPE)
        return weight.normal_(0.0, shape[1] ** -0.5, generator=generator)

    made = {"bf16": copies(plain)}
    for name, quantization in SCHEMES.items():
        matrix = _random(shape, quantization, generator)
        made[name] = copies(lambda matrix=matrix: pack(_cloned(matrix), DTYPE))  # type: ignore[misc]
        made[f"{name} dequantised"] = copies(lambda matrix=matrix: keep(_cloned(matrix), kernel))  # type: ignore[misc]
    return made


def _random(
    shape: tuple[int, int], quantization: Quantization, generator: torch.Generator
) -> CanonicalMatrix:
    codes = torch.randint(256, quantization.code_shape(shape), generator=generator, dtype=torch.uint8)
    limit = INT8_LIMIT if quantization.group_size is None else INT4_LIMIT
    scales = torch.rand(quantization.scale_shape(shape), generator=generator).add_(0.5)
    return CanonicalMatrix(codes, (scales / limit * shape[1] ** -0.5).bfloat16(), shape[1], quantization)


def _cloned(matrix: CanonicalMatrix) -> CanonicalMatrix:
    return CanonicalMatrix(matrix.codes.clone(), matrix.scales, matrix.inputs, matrix.quantization)


def compare(made: dict[str, Contender], num_rows: int, turns: int) -> dict[str, Any]:
    """Every contender once a turn, on the same rows."""
    inputs = made["bf16"].weights[0].shape[1]
    x_RI = torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(num_rows)).to(DTYPE)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(WARM_TURNS + turns):
        order = list(made.items())
        for name, contender in order if turn % 2 else order[::-1]:
            started = perf_counter()
            contender.run(turn, x_RI)
            if turn >= WARM_TURNS:
                seconds[name].append(perf_counter() - started)
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        ratio = spread([own / plain for own, plain in zip(times, seconds["bf16"], strict=True)])
        rate = made[name].nbytes / spread(times)["median"] / 1e9
        found[name] = {
            "ms": spread([1e3 * each for each in times]),
            "to_bf16": ratio,
            "weight_gb_per_s": round(rate, 2),
        }
    for name in SCHEMES:
        pair = (made[name].run(0, x_RI), made[f"{name} dequantised"].run(0, x_RI))
        found[name]["has_bits_of_dequantised"] = torch.equal(*pair)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--turns", type=int, default=20, help="counted turns of each matrix and number of rows"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--matrix", action="append", choices=MATRICES, help="only this one; repeatable")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    names = options.matrix or list(MATRICES)
    kernel = calibrate([MATRICES[name] for name in names], DTYPE)
    results: dict[str, Any] = {}
    for name in names:
        made = contenders(MATRICES[name], kernel)
        for num_rows in options.rows:
            if name == "head" and num_rows not in HEAD_ROWS:
                continue
            found = results[f"{name}, {num_rows} rows"] = compare(made, num_rows, options.turns)
            print(f"{name}, {num_rows} rows: bf16 {found['bf16']['ms']['median']:.2f} ms; " + _line(found))
    config = {"matrices": MATRICES, "turns": options.turns, "row_multiple": kernel.row_multiple}
    finish("bench_quantised", config, results, is_kept=options.keep)


def _line(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {each['to_bf16']['median']:.2f} ({each['weight_gb_per_s']:.1f} GB/s)"
        for name, each in found.items()
        if name != "bf16"
    )


if __name__ == "__main__":
    main()
