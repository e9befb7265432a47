"""How close do our own matrix products come to the memory's bandwidth, and how do they compare with PyTorch's?

One expert of Qwen3-30B-A3B (gate and up, activation, down: 2048 x 768 x 3) for 1 to 512 rows, and its head for 1 to
8, in bfloat16, int8 and int4 (groups of 32), each by our products at the machine's best level and by PyTorch's:
`F.linear`, its kernels for 8-bit and 4-bit weights, or, where it has none that passes, dequantising. A call has eight
experts, as a token does; so many are used in turn that weights come from memory and not from the processor's caches.
Contenders take turns. Reported: microseconds of one expert or head, gigabytes of weights a second, their share of the
bandwidth measured beside them by a plain C loop, and the ratio to PyTorch of the same turn (above 1: ours is faster).

Usage: python -m benchmarks.bench_kernels [--turns N] [--rows N ...] [--weights NAME ...] [--threads N] [--keep]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.read_bandwidth import read_bandwidth
from benchmarks.report import finish, spread
from experts.call import ExpertCall
from experts.cores import num_cores
from experts.ffn import ExpertWeights, compute_experts
from experts.huge_pages import weight_bytes
from experts.native_products import chosen_level
from experts.numerics import RowKernel
from experts.packed_matrix import CanonicalMatrix, Weight, linear, pack, take_as_it_is
from extraction.quantise import INT4_LIMIT, INT8_LIMIT, Quantization

WIDTH, EXPERT_WIDTH, VOCABULARY = 2048, 768, 151936
EXPERTS_OF_A_CALL = 8
ROWS = (1, 2, 4, 8, 16, 64, 512)
HEAD_ROWS = (1, 2, 4, 8)
WEIGHTS: dict[str, Quantization | None] = {
    "bfloat16": None,
    "int8": Quantization(scheme="int8", group_size=None),
    "int4": Quantization(scheme="int4", group_size=32),
}
CACHE_BYTES = 384 << 20
"""Beyond what caches hold; the experts of a contender together are about as large."""
DTYPE = torch.bfloat16
WARM_TURNS = 1
LIBRARY = RowKernel(8)
"""PyTorch's products, at a row multiple with which they pass the self-test on every machine tried."""


@dataclass(frozen=True)
class Contender:
    """One way of computing, with weights of its own that are used in turn."""

    num_calls: int
    run: Callable[[int, Tensor], object]
    """Of the call with this number."""


def contenders(name: str, level: str, *, is_head: bool) -> tuple[dict[str, Contender], int]:
    """Ours and PyTorch's, and the bytes of weights of one expert or head."""
    ours = RowKernel(1, "native", level)
    generator = torch.Generator().manual_seed(0)
    matrices = [(VOCABULARY, WIDTH)] if is_head else [(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)]
    plain = [_random(shape, WEIGHTS[name], generator) for shape in matrices]
    nbytes = sum(matrix.nbytes if isinstance(matrix, Tensor) else _coded_bytes(matrix) for matrix in plain)
    num_copies = max(1, CACHE_BYTES // nbytes)
    if is_head:
        heads = {
            who: [_prepared(plain[0], k) for _ in range(2)] for who, k in (("ours", ours), ("torch", LIBRARY))
        }
        return {
            "ours": Contender(2, lambda number, x_RD: linear(ours, x_RD, heads["ours"][number])),
            "torch": Contender(2, lambda number, x_RD: linear(LIBRARY, x_RD, heads["torch"][number])),
        }, nbytes
    num_calls = -(-num_copies // EXPERTS_OF_A_CALL)
    found = {}
    for who, kernel in (("ours", ours), ("torch", LIBRARY)):
        experts = [
            ExpertWeights(*(_prepared(matrix, kernel) for matrix in plain))
            for _ in range(num_calls * EXPERTS_OF_A_CALL)
        ]
        run = _linear_experts(experts) if who == "torch" and WEIGHTS[name] is None else _call(experts, kernel)
        found[who] = Contender(num_calls, run)
    return found, nbytes


def _call(experts: Sequence[ExpertWeights], kernel: RowKernel) -> Callable[[int, Tensor], object]:
    """As a worker computes them."""

    def run(number: int, x_RD: Tensor) -> object:
        rows = len(x_RD)
        first = number * EXPERTS_OF_A_CALL
        call = ExpertCall(
            "model",
            0,
            tuple(range(EXPERTS_OF_A_CALL)),
            (rows,) * EXPERTS_OF_A_CALL,
            tuple(range(rows)) * EXPERTS_OF_A_CALL,
            x_RD,
        )
        return compute_experts(call, experts[first : first + EXPERTS_OF_A_CALL], kernel)

    return run


def _linear_experts(experts: Sequence[ExpertWeights]) -> Callable[[int, Tensor], object]:
    """Bare `F.linear` calls, with nothing around them."""
    pairs = [expert.as_tensors() for expert in experts]

    def run(number: int, x_RD: Tensor) -> object:
        for gate_up_FD, down_DF in pairs[number * EXPERTS_OF_A_CALL : (number + 1) * EXPERTS_OF_A_CALL]:
            gate, up = F.linear(x_RD, gate_up_FD).chunk(2, dim=1)
            F.linear(F.silu(gate) * up, down_DF)
        return None

    return run


def _prepared(matrix: Tensor | CanonicalMatrix, kernel: RowKernel) -> Weight:
    """A copy of its own, in memory as the engine has it."""
    if isinstance(matrix, Tensor):
        return _copied(matrix)
    codes, scales = _copied(matrix.codes), _copied(matrix.scales)
    copy = CanonicalMatrix(codes, scales, matrix.inputs, matrix.quantization)
    return take_as_it_is(copy, kernel) if kernel.product == "native" else pack(copy, DTYPE)


def _copied(tensor: Tensor) -> Tensor:
    return weight_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _random(
    shape: tuple[int, int], quantization: Quantization | None, generator: torch.Generator
) -> Tensor | CanonicalMatrix:
    if quantization is None:
        return torch.empty(shape, dtype=DTYPE).normal_(0.0, shape[1] ** -0.5, generator=generator)
    codes = torch.randint(256, quantization.code_shape(shape), generator=generator, dtype=torch.uint8)
    limit = INT8_LIMIT if quantization.group_size is None else INT4_LIMIT
    scales = torch.rand(quantization.scale_shape(shape), generator=generator).add_(0.5)
    return CanonicalMatrix(codes, (scales / limit * shape[1] ** -0.5).bfloat16(), shape[1], quantization)


def _coded_bytes(matrix: CanonicalMatrix) -> int:
    return matrix.codes.nbytes + matrix.scales.nbytes


def compare(made: dict[str, Contender], num_rows: int, turns: int, per_call: int) -> dict[str, list[float]]:
    """Seconds of one expert or head, every contender once a turn on the same rows; a turn uses all weights once."""
    x_RD = torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows)).to(DTYPE)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(WARM_TURNS + turns):
        order = list(made.items())
        for name, contender in order if turn % 2 else order[::-1]:
            calls = contender.num_calls if num_rows <= max(HEAD_ROWS) else min(2, contender.num_calls)
            started = perf_counter()
            for number in range(calls):
                contender.run(number, x_RD)
            if turn >= WARM_TURNS:
                seconds[name].append((perf_counter() - started) / calls / per_call)
    return seconds


def summary(seconds: dict[str, list[float]], nbytes: int, bandwidth: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch_over_ours": spread([t / o for t, o in zip(seconds["torch"], seconds["ours"], strict=True)])
    }
    for name, times in seconds.items():
        rate = nbytes / spread(times)["median"]
        found[name] = {
            "us": spread([1e6 * each for each in times]),
            "gb_per_s": round(rate / 1e9, 1),
            "of_bandwidth": round(rate / bandwidth, 3),
        }
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7, help="counted turns of each case")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument(
        "--threads", type=int, default=num_cores(), help="of both contenders and of the bandwidth"
    )
    parser.add_argument("--no-head", action="store_true", help="experts only")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    level = chosen_level(DTYPE)
    if level is None:
        parser.error("our products are not built here")
    bandwidth = read_bandwidth(options.threads)
    print(f"memory: {bandwidth.bytes_per_s / 1e9:.1f} GB/s ({bandwidth.how}); level {level}")
    results: dict[str, Any] = {}
    for name in options.weights:
        for is_head in (False, True)[: 1 if options.no_head else 2]:
            made, nbytes = contenders(name, level, is_head=is_head)
            for num_rows in options.rows:
                if is_head and num_rows not in HEAD_ROWS:
                    continue
                times = compare(made, num_rows, options.turns, 1 if is_head else EXPERTS_OF_A_CALL)
                case = f"{name} {'head' if is_head else 'expert'}, {num_rows} rows"
                found = results[case] = summary(times, nbytes, bandwidth.bytes_per_s)
                print(f"{case}: {_line(found)}", flush=True)
    config = {
        "width": WIDTH,
        "expert_width": EXPERT_WIDTH,
        "vocabulary": VOCABULARY,
        "level": level,
        "turns": options.turns,
        "bandwidth_gb_per_s": bandwidth.bytes_per_s / 1e9,
        "bandwidth_how": bandwidth.how,
    }
    finish("bench_kernels", config, results, is_kept=options.keep)


def _line(found: dict[str, Any]) -> str:
    sides = ", ".join(
        f"{name} {found[name]['us']['median']:.0f} us ({found[name]['of_bandwidth']:.2f} of bandwidth)"
        for name in ("ours", "torch")
    )
    return f"{sides}, torch / ours {found['torch_over_ours']['median']:.2f}"


if __name__ == "__main__":
    main()
