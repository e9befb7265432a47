"""What makes a row's result independent of its neighbours: the row kernel, and the self-test that proves it.

Our own products (`experts.native_products`) sum every row in one order, and are used where they were built. Matrix
libraries choose another kernel, with another order of summation, for a few rows than for many. Inside one numerics
class every product of the model therefore goes through one `RowKernel`, which rounds the number of rows up to a
multiple at which each row was seen to have the same bits whatever stands beside it: one row with our products, some
with a library's. `calibrate` finds product and multiple when a process starts. docs/exactness.md is the contract.

On a device every product has one shape, `row_multiple` rows, so that its library has one kernel to choose from.

Does not promise anything across classes: another device, instruction set, dtype or library gives other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from experts.devices import CPU, arithmetic_name, library_name
from experts.errors import NotRowInvariant
from experts.native_products import VERSION, chosen_level, float_matrix
from experts.native_products import multiply as multiply_natively
from experts.triton_products import product_name

Product = Literal["native", "onednn", "mm", "blocks"]
Norm = Literal["", "fused", "halves"]
"""How a device computes the mean of a norm: by PyTorch's own kernel for it, or by adding halves; see `router.norms`."""

Grouping = Literal["", "grouped", "triton"]
"""How a device multiplies the experts of a call: one by one, by PyTorch's grouped matmul (`experts.grouped`), or by
our own kernel (`experts.triton_products`)."""

CANDIDATES: Mapping[torch.dtype, Sequence[tuple[Product, int]]] = {
    torch.float32: [("onednn", n) for n in (2, 4, 8, 16, 32)] + [("mm", n) for n in (8, 16, 32)],
    torch.bfloat16: [("mm", n) for n in (2, 4, 8, 16, 32)],
    torch.float16: [("mm", n) for n in (2, 4, 8, 16, 32)],
}
"""A library's product and row multiple, tried in this order where ours is not there or fails; the first that passes is
used. Lower multiples are left out even where
they pass a test: a single row takes a path of its own in every library, and the float32 library behind `torch.mm`
shares rows out to threads in eights. For float32 oneDNN comes first: with 2 rows it takes a quarter of the time that
`torch.mm` takes with 8 (2 cores, AVX-512). The other dtypes reach it through `torch.mm`."""
DEVICE_ROWS = (64, 32)
"""Rows of a device's products, tried in this order. Decoding waits for the weights, not for the rows that are added; a
prompt of some hundreds has about so many rows at each expert."""
REFERENCE_ROWS = 64
TESTED_ROWS = (1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 40)
MANY_ROWS = 512
"""A prompt's chunk. Libraries cut so many rows into blocks that few rows never see."""
MANY_ROWS_OUTPUTS = 4096
"""Tested with many rows, of each matrix."""
ROUNDED_RESULTS = 1 << 20
"""Compared of a library's product whose results are rounded: another order of summation then shows in one of fifty
thousand, or in fewer."""
ROUNDED_INPUTS = 1 << 24
"""Made for that at most: wide matrices of few outputs are compared in fewer results."""
MAX_TESTED_OUTPUTS = 16384
"""A head of 152,064 outputs is tested on its first rows only, to keep the start short."""

CLOSELY_TESTED_OUTPUTS = 256
LARGEST_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of our product against a library's, in parts of the largest result: some times what rounding explains."""


@dataclass(frozen=True)
class RowKernel:
    """Matrix products in which a row's bits do not depend on the other rows."""

    row_multiple: int
    product: Product = "mm"
    level: str = ""
    """Of our own product."""
    device: torch.device = CPU
    norm: Norm = ""
    """Of a device."""
    grouping: Grouping = ""
    """Of experts, on a device."""
    is_on_cpu: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_on_cpu", self.device.type == "cpu")

    @property
    def name(self) -> str:
        """In the name of the numerics class of experts, which have no norm."""
        if self.product == "blocks":
            grouping = product_name() if self.grouping == "triton" else self.grouping
            return "-".join(part for part in (f"blocks{self.row_multiple}", grouping, "1") if part)
        return f"native-{self.level}-{VERSION}" if self.product == "native" else f"{self.product}-1"

    @property
    def most_rows(self) -> int | None:
        """Of one step: for more nobody has proved that a row's bits stay the same. None: our own product sums every row
        by itself, however many there are."""
        return None if self.product == "native" else MANY_ROWS

    def padded(self, num_rows: int) -> int:
        """The number of rows that a buffer for `num_rows` must have."""
        return -(-num_rows // self.row_multiple) * self.row_multiple

    def linear(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """x @ weight.T for any number of rows. Returns (R, O), maybe a view of a padded buffer."""
        num_rows = x_RI.shape[0]
        missing = self.padded(num_rows) - num_rows
        if missing:
            x_RI = torch.cat((x_RI, x_RI[-1:].expand(missing, -1)))
        return self.multiply(x_RI, weight_OI)[:num_rows]

    def multiply(self, x_PI: Tensor, weight_OI: Tensor, out_PO: Tensor | None = None) -> Tensor:
        """x @ weight.T for a number of rows that is a multiple already. Writes to `out_PO` where it is given."""
        if self.product == "native":
            return multiply_natively(self.level, x_PI, float_matrix(weight_OI), out_PO)
        most = MANY_ROWS
        if self.product == "blocks":
            most, x_PI = self.row_multiple, x_PI.contiguous()
        if x_PI.shape[0] > most:
            return self._multiply_runs(x_PI, weight_OI, out_PO, most)
        if self.product in ("mm", "blocks"):
            return torch.mm(x_PI, weight_OI.t(), out=out_PO)
        y_PO: Tensor = torch.ops.mkldnn._linear_pointwise(x_PI, weight_OI, None, "none", [], "")
        return y_PO if out_PO is None else out_PO.copy_(y_PO)

    def _multiply_runs(self, x_PI: Tensor, weight_OI: Tensor, out_PO: Tensor | None, most: int) -> Tensor:
        """So many rows at a time: on a device every product of one matrix has the same shape, and a library gets no
        more than it is proved for, whatever a frame brings to an actor."""
        if out_PO is None:
            out_PO = x_PI.new_empty(x_PI.shape[0], weight_OI.shape[0])
        for first in range(0, x_PI.shape[0], most):
            rows = slice(first, first + most)
            self.multiply(x_PI[rows], weight_OI, out_PO[rows])
        return out_PO


def swiglu(gate_up_RF: Tensor) -> Tensor:
    """silu(gate) * up for rows that hold gate and up side by side. (R, 2F) -> (R, F), same dtype.

    silu is written with exp, because PyTorch's own gives other bits in the last, not vectorised, elements of
    a buffer than in the others, and which elements those are depends on the number of rows.
    """
    gate, up = gate_up_RF.chunk(2, dim=1)
    gate = gate.float()
    silu = gate / torch.exp(-gate).add_(1.0)
    return silu.to(up.dtype).mul_(up)


def numerics_class(device: torch.device, dtype: torch.dtype, kernel: RowKernel) -> str:
    """Name of the set of machines and settings within which results are bitwise equal.

    Quantised experts add two parts, what they are and how they are multiplied (`experts.quantised`).
    """
    name = str(dtype).removeprefix("torch.")
    return f"{device.type}/{arithmetic_name(device)}/{name}/{library_name(device)}/{kernel.name}"


def quantization_in(class_name: str) -> str | None:
    """How the experts are quantised that a class computes, as its name tells; None where they are as published.

    Those of another quantisation are another model, not only other bits of the same one.
    """
    fields = class_name.split("/")
    return fields[5] if len(fields) > 5 else None


def calibrate(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device | None = None
) -> RowKernel:
    """Find the first candidate with which every (out, in) shape gives each row the same bits.

    The bits to reproduce are those of a product with 64 rows by one thread; what reproduces them are as many threads
    as this process computes with. Raises NotRowInvariant when no candidate passes.
    """
    device = device or CPU
    generator = torch.Generator().manual_seed(0)
    candidates = _candidates(dtype, device)
    for outputs, inputs in sorted(set(shapes)):
        outputs = min(outputs, MAX_TESTED_OUTPUTS)
        weight = torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5).to(device, dtype)
        x = torch.randn(REFERENCE_ROWS, inputs, generator=generator).to(device, dtype)
        while candidates and not _is_invariant(candidates[0], x, weight):
            candidates.pop(0)
        if not candidates:
            raise NotRowInvariant(f"{outputs}x{inputs}", str(dtype))
    return candidates[0]


def _candidates(dtype: torch.dtype, device: torch.device) -> list[RowKernel]:
    if device.type != "cpu":
        return [RowKernel(n, "blocks", "", device) for n in DEVICE_ROWS]
    candidates = [RowKernel(n, product) for product, n in CANDIDATES[dtype] if _is_usable(product)]
    level = chosen_level(dtype)
    return candidates if level is None else [RowKernel(1, "native", level), *candidates]


def _is_usable(product: Product) -> bool:
    """oneDNN's linear is reached through an operator of PyTorch's compiler, which need not be there."""
    if product == "mm":
        return True
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return bool(torch.backends.mkldnn.is_available()) and has_operator  # type: ignore[no-untyped-call]


@contextmanager
def computing_threads(num_threads: int) -> Iterator[None]:
    """Compute with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """Compute with one thread inside: the bits that any number of threads must reproduce."""
    return computing_threads(1)


def _is_invariant(kernel: RowKernel, x: Tensor, weight: Tensor) -> bool:
    with one_thread():
        reference = kernel.multiply(x, weight)
    part = weight[:MANY_ROWS_OUTPUTS]
    if kernel.product in ("native", "blocks") and not _is_close(reference, x, weight):
        return False
    return (
        gives_few_rows_their_bits(lambda rows: kernel.linear(rows, weight), x, reference)
        and gives_many_rows_their_bits(
            lambda rows: kernel.linear(rows, part), x, reference[:, :MANY_ROWS_OUTPUTS]
        )
        and (kernel.product != "mm" or x.dtype == torch.float32 or _keeps_rounded_bits(kernel, part))
    )


def _keeps_rounded_bits(kernel: RowKernel, weight: Tensor) -> bool:
    """Whether the fewest rows that are multiplied have what they have among all, in many numbers."""
    generator = torch.Generator().manual_seed(1)
    outputs, inputs = weight.shape
    for _ in range(-(-min(ROUNDED_RESULTS // outputs, ROUNDED_INPUTS // inputs) // REFERENCE_ROWS)):
        x = torch.randn(REFERENCE_ROWS, inputs, generator=generator).to(weight.dtype)
        groups = [kernel.multiply(group, weight) for group in torch.split(x, kernel.row_multiple)]
        if not torch.equal(torch.cat(groups), kernel.multiply(x, weight)):
            return False
    return True


def _is_close(found: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Of some outputs, to the host library's product: a compiler's or a device's mistake must not be served."""
    some = slice(None, None, -(-weight.shape[0] // CLOSELY_TESTED_OUTPUTS))
    plain = torch.mm(x.float().cpu(), weight[some].float().cpu().t())
    return bool(
        (found[:, some].float().cpu() - plain).abs().max() <= LARGEST_ERRORS[x.dtype] * plain.abs().max()
    )


def gives_few_rows_their_bits(linear: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor) -> bool:
    """Whether a product gives any few of the REFERENCE_ROWS rows of x what they have among all of them.

    linear: takes any number of rows. reference: of all rows, by one thread.
    """
    for num_rows in TESTED_ROWS:
        first = REFERENCE_ROWS - num_rows  # the last rows, so that a row's place in the call changes too
        if not torch.equal(linear(x[first:]), reference[first:]):
            return False
    return True


def gives_many_rows_their_bits(linear: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor) -> bool:
    """The same for MANY_ROWS rows."""
    repeats = MANY_ROWS // REFERENCE_ROWS
    return torch.equal(linear(x.repeat(repeats, 1)), reference.repeat(repeats, 1))
