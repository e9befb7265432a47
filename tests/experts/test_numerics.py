"""The row kernel, its calibration, and the names of numerics classes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from experts.cores import SMALL_MATRIX_ELEMENTS, num_cores, useful_threads
from experts.errors import NotRowInvariant
from experts.native_products import TORCH, VARIABLE, chosen_level
from experts.numerics import (
    CANDIDATES,
    MANY_ROWS,
    REFERENCE_ROWS,
    TESTED_ROWS,
    RowKernel,
    calibrate,
    numerics_class,
    one_thread,
    swiglu,
)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(48, 64), (64, 24), (517, 52), (1536, 256), (60, 768)]


@pytest.fixture
def without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a library's products, as where ours were not built."""
    monkeypatch.setenv(VARIABLE, TORCH)


@pytest.mark.parametrize("ours", ["with ours", "without ours"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_the_same_bits_beside_any_number_of_rows_and_by_any_threads(
    dtype: torch.dtype, shape: tuple[int, int], ours: str, request: pytest.FixtureRequest
) -> None:
    if ours == "without ours":
        request.getfixturevalue("without_ours")
    outputs, inputs = shape
    kernel = calibrate([shape], dtype)
    generator = torch.Generator().manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(dtype)
    x = torch.randn(700, inputs, generator=generator).to(dtype)
    with one_thread():
        whole = kernel.linear(x, weight)
    for first, count in ((0, 1), (699, 1), (3, 2), (10, 5), (64, 64), (100, 65), (77, 200), (188, 512)):
        rows = slice(first, first + count)
        assert torch.equal(kernel.linear(x[rows], weight), whole[rows])
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, rtol=0.02, atol=0.02)


def test_padded_is_the_next_multiple() -> None:
    assert [RowKernel(8).padded(count) for count in (1, 7, 8, 9, 16)] == [8, 8, 8, 16, 16]


@pytest.mark.usefixtures("without_ours")
@pytest.mark.parametrize("dtype", list(CANDIDATES))
def test_a_single_row_is_never_computed_by_itself_in_a_library(dtype: torch.dtype) -> None:
    """A product with one row takes a path of its own in every library, even where a test does not show it."""
    assert min(multiple for _, multiple in CANDIDATES[dtype]) >= 2
    kernel = calibrate([(8, 8)], dtype)
    assert (kernel.product, kernel.row_multiple) in CANDIDATES[dtype]


def _spoil(
    monkeypatch: pytest.MonkeyPatch, is_spoilt: Callable[[RowKernel, torch.Tensor, torch.Tensor], bool]
) -> None:
    """Let products come out a little wrong where a library might take another path."""
    multiply = RowKernel.multiply

    def spoilt(
        kernel: RowKernel, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return multiply(kernel, x, weight, out) * (1 + 1e-6 * is_spoilt(kernel, x, weight))

    monkeypatch.setattr(RowKernel, "multiply", spoilt)


def test_a_library_gets_no_more_rows_at_once_than_were_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    multiply = torch.mm

    def counted(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(x.shape[0])
        return multiply(x, weight, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    x, weight = torch.randn(2 * MANY_ROWS + 8, 16), torch.randn(24, 16)
    found = RowKernel(8).linear(x, weight)
    assert seen == [MANY_ROWS, MANY_ROWS, 8]
    assert torch.equal(found[:MANY_ROWS], multiply(x[:MANY_ROWS], weight.t()))
    assert torch.allclose(found, x @ weight.t(), atol=1e-5)


@pytest.mark.usefixtures("without_ours")
def test_calibration_takes_the_multiple_that_suits_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape that needs 32 rows decides for all."""
    _spoil(monkeypatch, lambda kernel, x, weight: weight.shape[0] == 24 and x.shape[0] % 32 > 0)
    assert calibrate([(16, 64)], torch.float32).row_multiple < 32
    assert calibrate([(16, 64), (24, 64), (40, 64)], torch.float32).row_multiple == 32


@pytest.mark.usefixtures("without_ours")
def test_calibration_notices_another_order_of_summation_behind_rounded_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It shows in one result of tens of thousands: no other test of so small a matrix looks at as many."""
    multiply = RowKernel.multiply

    def rounded(
        kernel: RowKernel, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = multiply(kernel, x, weight, out)
        if x.shape[0] < 4:
            found[(found.view(torch.int16) & 0x7FFF) == 0x4060] += 1  # 3.5 and -3.5
        return found

    monkeypatch.setattr(RowKernel, "multiply", rounded)
    assert calibrate([(72, 48)], torch.bfloat16).row_multiple == 4


@pytest.mark.usefixtures("without_ours")
def test_calibration_takes_another_product_where_one_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, lambda kernel, x, weight: kernel.product == "onednn" and x.shape[0] < 64)
    assert calibrate([(16, 64)], torch.float32).product == "mm"


@pytest.mark.usefixtures("without_ours")
def test_calibration_does_without_an_operator_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert calibrate([(16, 64)], torch.float32).product == "mm"


needs_ours = pytest.mark.skipif(
    chosen_level(torch.float32) is None, reason="native products are not built here"
)


@needs_ours
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_product_is_taken_first_and_pads_nothing(dtype: torch.dtype) -> None:
    kernel = calibrate(SHAPES, dtype)
    assert (kernel.product, kernel.row_multiple) == ("native", 1)
    assert kernel.name.startswith(f"native-{kernel.level}-")
    assert calibrate([(8, 8)], torch.float16).product == "mm"


@needs_ours
@pytest.mark.parametrize("error", [1e-6, 0.1])
def test_our_product_gives_way_where_it_varies_or_is_wrong(
    error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_wrong = error > 1e-3  # then for every number of rows
    multiply = RowKernel.multiply

    def spoilt(
        kernel: RowKernel, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        applies = kernel.product == "native" and (is_wrong or x.shape[0] == 3)
        return multiply(kernel, x, weight, out) * (1 + error * applies)

    monkeypatch.setattr(RowKernel, "multiply", spoilt)
    assert calibrate([(16, 64)], torch.float32).product != "native"


@pytest.mark.parametrize("rows", [REFERENCE_ROWS + 1, MANY_ROWS])
def test_kernel_that_changes_only_for_many_rows_is_refused(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    _spoil(monkeypatch, lambda kernel, x, weight: x.shape[0] >= rows)
    with pytest.raises(NotRowInvariant, match="16x64"):
        calibrate([(16, 64)], torch.float32)


def test_kernel_that_depends_on_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _spoil(monkeypatch, lambda kernel, x, weight: torch.get_num_threads() > 1)
    try:
        with pytest.raises(NotRowInvariant):
            calibrate([(16, 64)], torch.float32)
    finally:
        torch.set_num_threads(before)


def test_one_thread_gives_the_threads_back_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tested_rows_cover_every_padding_of_every_multiple() -> None:
    for candidates in CANDIDATES.values():
        for _, multiple in candidates:
            assert any(rows % multiple for rows in TESTED_ROWS)
            assert any(rows > multiple for rows in TESTED_ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 19, 24, 768])
def test_swiglu_gives_a_row_the_same_bits_alone(dtype: torch.dtype, width: int) -> None:
    rows = (torch.randn(129, 2 * width, generator=torch.Generator().manual_seed(width)) * 5).to(dtype)
    whole = swiglu(rows)
    for first, count in ((0, 1), (128, 1), (5, 3), (40, 64)):
        assert torch.equal(swiglu(rows[first : first + count].clone()), whole[first : first + count])


def test_swiglu_in_bfloat16_rounds_the_activation_and_then_the_product() -> None:
    """As the published model does; rounding once at the end would differ in every third element."""
    rows = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    gate, up = rows.chunk(2, dim=1)
    published = torch.nn.functional.silu(gate) * up
    agreeing = (swiglu(rows) == published).float().mean()
    rounded_once = (torch.nn.functional.silu(gate.float()) * up.float()).bfloat16()
    assert agreeing > 0.99
    assert (rounded_once == published).float().mean() < agreeing


def test_swiglu_leaves_its_input_as_it_was() -> None:
    rows = torch.randn(4, 48)
    before = rows.clone()
    swiglu(rows)
    assert torch.equal(rows, before)


def test_class_names_what_decides_the_bits() -> None:
    cpu, kernel = torch.device("cpu"), RowKernel(2)
    name = numerics_class(cpu, torch.bfloat16, kernel)
    device, instructions, dtype, library, product = name.split("/")
    assert (device, dtype) == ("cpu", "bfloat16")
    assert instructions == torch.backends.cpu.get_cpu_capability().lower()
    assert torch.__version__ in library
    assert product.startswith("mm")
    others = {
        numerics_class(cpu, torch.float32, kernel),
        numerics_class(cpu, torch.float32, RowKernel(2, "onednn")),
        *(numerics_class(cpu, torch.bfloat16, RowKernel(1, "native", level)) for level in ("avx2", "avx512")),
    }
    assert len(others | {name}) == 5


def test_small_experts_are_computed_by_one_thread() -> None:
    assert useful_threads(8, SMALL_MATRIX_ELEMENTS - 1) == 1
    assert useful_threads(8, SMALL_MATRIX_ELEMENTS) == 8
    assert useful_threads(0, SMALL_MATRIX_ELEMENTS) == 1


def test_cores_are_those_that_the_process_may_use() -> None:
    assert num_cores() == len(os.sched_getaffinity(0))
