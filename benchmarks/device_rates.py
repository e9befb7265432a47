"""What a device and the link to it can do, and what experts' products reach of that: parts of `bench_device`.

Times are of whole calls that end when the device has done them. Every function takes the CPU as well, for tests; no
speed of that means anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from experts.call import ExpertCall
from experts.ffn import ExpertWeights, compute_experts
from experts.grouped import view_stack
from experts.numerics import RowKernel
from experts.packed_matrix import CanonicalMatrix
from experts.quantised import choose_product, packed_for
from experts.transfers import Transfers
from extraction.quantise import Quantization

WARM_UP = 3


@dataclass(frozen=True)
class ExpertShape:
    """One layer's experts."""

    num_experts: int
    per_token: int
    width: int
    inner: int

    @property
    def bytes_each(self) -> int:
        """In bfloat16."""
        return 3 * self.width * self.inner * 2

    @property
    def flops_per_row(self) -> int:
        return 6 * self.width * self.inner


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(device: torch.device, call: Callable[[int], object], repeats: int) -> float:
    """Of one call, which is given its number; each is waited for."""
    times = []
    for number in range(WARM_UP + repeats):
        wait_for(device)
        began = perf_counter()
        call(number)
        wait_for(device)
        times.append(perf_counter() - began)
    return statistics.median(times[WARM_UP:])


def memory_bytes_s(device: torch.device, nbytes: int, repeats: int) -> float:
    """Read and written by a copy within the device's memory."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_s(device, lambda number: target.copy_(source), repeats)


def matmul_flops(device: torch.device, size: int, repeats: int) -> float:
    """Of a square product in bfloat16, by the device's library."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / median_s(device, lambda number: torch.mm(a, b), repeats)


def link_bytes_s(transfers: Transfers, nbytes: int, repeats: int) -> float:
    """Of one copy from the host's memory to the device's, as experts are copied."""
    source = transfers.memory.take(nbytes, is_aligned=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=transfers.device)
    took_s = median_s(transfers.device, lambda number: transfers.start(source, target).wait(), repeats)
    transfers.memory.release(source)
    return nbytes / took_s


def make_experts(
    kernel: RowKernel, shape: ExpertShape, quantization: Quantization | None = None
) -> list[ExpertWeights]:
    """One layer's, of random numbers: in bfloat16 side by side, or as codes that are multiplied by what is proven."""
    dtype = torch.bfloat16
    if quantization is None:
        records = torch.empty(shape.num_experts, shape.bytes_each, dtype=torch.uint8, device=kernel.device)
        records.view(dtype).normal_(0.0, shape.width**-0.5)
        stack = view_stack(records, dtype, shape.width)
        pairs = enumerate(zip(stack.gate_up_EFD, stack.down_EDF, strict=True))
        return [ExpertWeights(gate_up, down, stack=stack, place=place) for place, (gate_up, down) in pairs]
    shapes = [(2 * shape.inner, shape.width), (shape.width, shape.inner)]
    product = choose_product(shapes, quantization, dtype, kernel)
    experts = []
    for _ in range(shape.num_experts):
        matrices = []
        for size in shapes:
            codes = torch.randint(256, quantization.code_shape(size), dtype=torch.uint8)
            scales = torch.full(quantization.scale_shape(size), 1e-3, dtype=torch.bfloat16)
            matrix = CanonicalMatrix(codes, scales, size[1], quantization).on(kernel.device)
            matrices.append(packed_for(product, matrix, dtype, kernel))
        experts.append(ExpertWeights(*matrices))
    return experts


def experts_s(
    kernel: RowKernel,
    shape: ExpertShape,
    layers: Sequence[list[ExpertWeights]],
    num_tokens: int,
    repeats: int,
) -> float:
    """Of one layer's experts for so many tokens that choose evenly; layers take turns, so that the experts of a call
    were not used by the last ones, and caches do not have them."""
    tokens_TD = torch.randn(num_tokens, shape.width, dtype=torch.bfloat16, device=kernel.device)
    call = spread_call(shape, tokens_TD)
    with torch.inference_mode():
        return median_s(
            kernel.device,
            lambda number: compute_experts(
                call, [layers[number % len(layers)][expert] for expert in call.experts], kernel
            ),
            repeats,
        )


def spread_call(shape: ExpertShape, tokens_TD: torch.Tensor) -> ExpertCall:
    """Every token's experts follow the ones of the token before."""
    rows: dict[int, list[int]] = {}
    for token in range(len(tokens_TD)):
        for rank in range(shape.per_token):
            rows.setdefault((token * shape.per_token + rank) % shape.num_experts, []).append(token)
    experts = tuple(sorted(rows))
    counts = tuple(len(rows[expert]) for expert in experts)
    return ExpertCall("model", 0, experts, counts, tuple(t for e in experts for t in rows[e]), tokens_TD)


def touched_bytes(call: ExpertCall, experts: Sequence[ExpertWeights]) -> int:
    """Of the weights that a call reads once."""
    return sum(experts[expert].nbytes for expert in call.experts)


def shares(values: Sequence[float], bound: float) -> list[float]:
    return [round(value / bound, 4) for value in values]
