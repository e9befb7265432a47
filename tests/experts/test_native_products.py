"""Our own products: against a plain reference in float64, and bit by bit against themselves, at every level here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts import native_build, native_products
from experts.errors import ProductsUnavailable
from experts.native_products import (
    DTYPES,
    LEVELS,
    TORCH,
    VARIABLE,
    GatedMatrices,
    NativeMatrix,
    chosen_level,
    coded_matrix,
    compute_gated,
    find_finite,
    float_matrix,
    gated_matrices,
    library,
    multiply,
)
from experts.packed_matrix import CanonicalMatrix
from extraction.quantise import Quantization

BUILT = library()
if BUILT is None:
    pytest.skip("native products are not built here", allow_module_level=True)
LEVELS_HERE = LEVELS[: LEVELS.index(BUILT.best_level) + 1]
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
"""Of a sum, in parts of the sum of sizes: rounding of inputs' products, and of the result to bfloat16."""
FORMS: list[Quantization | None] = [
    None,
    Quantization(scheme="int8", group_size=None),
    Quantization(scheme="int4", group_size=32),
    Quantization(scheme="int4", group_size=64),
    Quantization(scheme="int4", group_size=128),
]


@dataclass(frozen=True)
class Case:
    """A matrix as the products take it, and the values that it stands for."""

    native: NativeMatrix
    values_OI: Tensor

    @classmethod
    def make(
        cls, outputs: int, inputs: int, form: Quantization | None, dtype: torch.dtype, seed: int
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        if form is None:
            weight = torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5).to(dtype)
            return cls(float_matrix(weight), weight.double())
        codes = torch.randint(256, form.code_shape((outputs, inputs)), generator=generator, dtype=torch.uint8)
        scales = torch.rand(form.scale_shape((outputs, inputs)), generator=generator).sub_(0.5).mul_(0.02)
        matrix = CanonicalMatrix(codes, scales.bfloat16(), inputs, form)
        native = coded_matrix(codes, matrix.scales, inputs, form.group_size)
        return cls(native, matrix.dequantised().double())


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _rows(num_rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(num_rows)).to(dtype)


cases = st.fixed_dictionaries(
    {
        "outputs": st.integers(1, 140),
        "inputs": st.integers(1, 300),
        "form": st.sampled_from(FORMS),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.parametrize("level", LEVELS_HERE)
@given(case=cases, num_rows=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_sums_are_those_of_a_plain_product(level: str, case: dict[str, object], num_rows: int) -> None:
    made = Case.make(**case)  # type: ignore[arg-type]
    x = _rows(num_rows, made.native.inputs, case["dtype"])  # type: ignore[arg-type]
    found = multiply(level, x, made.native).double()
    sizes = x.double().abs() @ made.values_OI.abs().t()
    assert bool(((found - x.double() @ made.values_OI.t()).abs() <= TOLERANCES[x.dtype] * sizes).all())


@pytest.mark.parametrize("level", LEVELS_HERE)
@given(case=cases, cuts=st.lists(st.integers(0, 40), max_size=6), threads=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_row_has_its_bits_whatever_comes_with_it_and_whoever_computes(
    level: str, case: dict[str, object], cuts: list[int], threads: int
) -> None:
    made = Case.make(**case)  # type: ignore[arg-type]
    x = _rows(40, made.native.inputs, case["dtype"])  # type: ignore[arg-type]
    torch.set_num_threads(1)
    whole = multiply(level, x, made.native)
    torch.set_num_threads(threads)
    edges = sorted({0, 40, *cuts})
    parts = [multiply(level, x[a:b], made.native) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(multiply(level, x.flip(0), made.native).flip(0), whole)


@pytest.mark.parametrize("num_rows", [95, 96, 97, 300])
def test_runs_of_many_rows_of_a_small_matrix_have_the_bits_of_each_row_alone(num_rows: int) -> None:
    made = Case.make(24, 40, None, torch.bfloat16, 3)
    x = _rows(num_rows, 40, torch.bfloat16)
    torch.set_num_threads(2)
    whole = multiply(LEVELS_HERE[-1], x, made.native)
    for row in (0, 94, 95, 96, 191, 192, num_rows - 1):
        if row < num_rows:
            assert torch.equal(multiply(LEVELS_HERE[-1], x[row : row + 1], made.native)[0], whole[row])


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "float" if form is None else form.name)
def test_output_has_its_bits_whatever_outputs_stand_beside(level: str, form: Quantization | None) -> None:
    made = Case.make(13, 200, form, torch.bfloat16, 1)
    x = _rows(9, 200, torch.bfloat16)
    whole = multiply(level, x, made.native)
    for first, end in ((0, 1), (5, 6), (12, 13), (3, 13)):
        weights, scales = made.native.weights[first:end], made.native.scales
        group = form.group_size if form else None
        part = (
            float_matrix(weights) if scales is None else coded_matrix(weights, scales[first:end], 200, group)
        )
        assert torch.equal(multiply(level, x, part), whole[:, first:end])


def _experts(
    form: Quantization | None, dtype: torch.dtype, sizes: tuple[int, int], count: int
) -> list[tuple[GatedMatrices, Tensor, Tensor]]:
    width, inner = sizes
    made = []
    for seed in range(count):
        first = Case.make(2 * inner, width, form, dtype, seed)
        second = Case.make(width, inner, form, dtype, seed + 100)
        made.append((gated_matrices(first.native, second.native), first.values_OI, second.values_OI))
    return made


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "float" if form is None else form.name)
@pytest.mark.parametrize("sizes", [(64, 24), (130, 97), (256, 192)])
def test_gated_rows_agree_with_a_plain_reference_and_have_their_bits_alone(
    level: str, dtype: torch.dtype, form: Quantization | None, sizes: tuple[int, int]
) -> None:
    experts = _experts(form, dtype, sizes, 3)
    tokens = _rows(11, sizes[0], dtype)
    counts, token_of = (1, 9, 4), (3, *range(9), 10, 3, 0, 0)
    matrices = [expert for expert, _, _ in experts]
    found = compute_gated(level, tokens, matrices, counts, token_of)
    first = 0
    for (alone, gate_up, down), count in zip(experts, counts, strict=True):
        x = tokens[list(token_of[first : first + count])]
        gate, up = (x.double() @ gate_up.t()).chunk(2, dim=1)
        expected = (F.silu(gate) * up) @ down.t()
        tolerance = 3e-5 if dtype is torch.float32 else 3e-2
        assert (
            found[first : first + count].double() - expected
        ).abs().max() <= tolerance * expected.abs().max()
        for row in range(count):
            by_itself = compute_gated(level, x[row : row + 1], [alone], (1,))
            assert torch.equal(by_itself[0], found[first + row])
        first += count


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "float" if form is None else form.name)
@pytest.mark.parametrize("inner", [63, 101, 203])
def test_gated_rows_of_several_tiles_and_parts_of_panels_have_their_bits_alone(
    level: str, form: Quantization | None, inner: int
) -> None:
    """Rows whose sums wait for their activation together, one more, and twice as many; outputs that end in a part."""
    counts = (7, 48, 49, 97)
    experts = [made for made, _, _ in _experts(form, torch.bfloat16, (70, inner), len(counts))]
    tokens = _rows(sum(counts), 70, torch.bfloat16)
    torch.set_num_threads(2)
    found = compute_gated(level, tokens, experts, counts)
    first = 0
    for expert, count in zip(experts, counts, strict=True):
        alone = [
            compute_gated(level, tokens[row : row + 1], [expert], (1,)) for row in range(first, first + count)
        ]
        assert torch.equal(found[first : first + count], torch.cat(alone))
        first += count


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_activation_survives_extremes(level: str) -> None:
    """Gates from far below to far above: as `silu`, which is 0 times something at one end."""
    gates = torch.tensor([-1e30, -200.0, -88.5, -87.0, -10.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 89.0, 1e30])
    count = len(gates)
    gate_up = torch.cat((gates[:, None], torch.ones(count, 1)))
    matrices = gated_matrices(float_matrix(gate_up), float_matrix(torch.eye(count)))
    found = compute_gated(level, torch.ones(1, 1), [matrices], (1,))
    torch.testing.assert_close(found[0], F.silu(gates), rtol=3e-6, atol=1e-35)


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "float" if form is None else form.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_stay_in_their_row(
    level: str, form: Quantization | None, value: float
) -> None:
    made = Case.make(20, 300, form, torch.bfloat16, 3)
    x = _rows(8, 300, torch.bfloat16)
    clean = multiply(level, x, made.native)
    x[3, 299] = value
    found = multiply(level, x, made.native)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert not bool(found[3].isfinite().any())
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "float" if form is None else form.name)
def test_rows_scaled_by_a_power_of_two_give_the_same_bits_scaled(
    level: str, form: Quantization | None
) -> None:
    """Whatever units a product counts in; and nothing comes of nothing."""
    made = Case.make(20, 300, form, torch.bfloat16, 3)
    x = _rows(4, 300, torch.bfloat16)
    expected = multiply(level, x, made.native)
    for exponent in (-60, -1, 1, 60):
        assert torch.equal(multiply(level, x * 2.0**exponent, made.native), expected * 2.0**exponent)
    assert not bool(multiply(level, torch.zeros_like(x), made.native).any())


@pytest.mark.parametrize("level", LEVELS_HERE)
def test_large_input_costs_those_beside_it_in_an_int8_product_at_most_its_fifteenth_bit(level: str) -> None:
    """Activations of 2^-12 to 2^12 side by side: level `avx512bf16` counts 128 of them in one unit, others do not."""
    made = Case.make(40, 300, FORMS[1], torch.bfloat16, 5)
    exponents = torch.randint(-12, 13, (6, 300), generator=torch.Generator().manual_seed(6))
    x = (_rows(6, 300, torch.bfloat16).float() * 2.0**exponents).bfloat16()
    exact = x.double() @ made.values_OI.t()
    lost = torch.zeros_like(exact)
    for block_RI, weights_OI in zip(
        x.double().split(128, dim=1), made.values_OI.split(128, dim=1), strict=True
    ):
        lost += 2.0**-15 * block_RI.abs().amax(dim=1, keepdim=True) * weights_OI.abs().sum(dim=1)
    sizes = x.double().abs() @ made.values_OI.abs().t()
    found = multiply(level, x, made.native).double()
    assert bool(((found - exact).abs() <= lost + 2.0**-8 * exact.abs() + 1e-6 * sizes).all())


def test_rows_apart_columns_apart_and_repeated_rows_are_read_right() -> None:
    made = Case.make(33, 70, None, torch.float32, 3)
    level, x = LEVELS_HERE[-1], _rows(8, 70, torch.float32)
    expected = multiply(level, x, made.native)
    wide = torch.full((8, 100), float("nan"))
    wide[:, :70] = x
    assert torch.equal(multiply(level, wide[:, :70], made.native), expected)
    assert torch.equal(multiply(level, x.t().contiguous().t(), made.native), expected)
    assert torch.equal(multiply(level, x[2:3].expand(5, -1), made.native), expected[2:3].expand(5, -1))
    out = torch.full((8, 50), 7.0)
    multiply(level, x, made.native, out[:, 3:36])
    assert torch.equal(out[:, 3:36], expected)
    assert bool((out[:, :3] == 7).all() and (out[:, 36:] == 7).all())


def test_no_rows_and_no_inputs_are_no_work() -> None:
    level = LEVELS_HERE[0]
    assert multiply(level, torch.ones(0, 5), float_matrix(torch.ones(3, 5))).shape == (0, 3)
    assert torch.equal(multiply(level, torch.ones(2, 0), float_matrix(torch.ones(3, 0))), torch.zeros(2, 3))


X, W = torch.ones(2, 8), torch.ones(3, 8)


@pytest.mark.parametrize(
    "weight",
    [W[0], W.double(), W.half(), W.t(), W[:, :4], W.expand(2, 3, 8), W.to("meta")],
    ids=["vector", "float64", "float16", "transposed", "columns", "cube", "nowhere"],
)
def test_matrix_that_is_not_row_major_here_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="no matrix for native products"):
        float_matrix(weight)


CODES, SCALES = torch.zeros(3, 20, dtype=torch.uint8), torch.ones(3, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("codes", "scales", "inputs", "group"),
    [
        (CODES, SCALES, 42, 32),
        (CODES, SCALES, 40, 16),
        (CODES, SCALES, 40, None),
        (CODES, SCALES[:, :1], 40, 32),
        (CODES, SCALES[:2], 40, 32),
        (CODES, SCALES.float(), 40, 32),
        (CODES.view(torch.int8), SCALES, 40, 32),
        (CODES[:, ::2], SCALES, 20, 32),
        (CODES[0], SCALES, 40, 32),
    ],
)
def test_codes_that_do_not_fit_their_scales_are_refused(
    codes: Tensor, scales: Tensor, inputs: int, group: int | None
) -> None:
    coded_matrix(CODES, SCALES, 40, 32)
    with pytest.raises(ValueError, match="no matrix for native products"):
        coded_matrix(codes, scales, inputs, group)


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (X[:, :7], None),
        (X[0], None),
        (X.double(), None),
        (X.bfloat16(), None),
        (X, torch.empty(2, 4)),
        (X, torch.empty(3, 3)),
        (X, torch.empty(2, 3, dtype=torch.bfloat16)),
        (X, torch.empty(3, 2).t()),
        (X, torch.empty(1, 3).expand(2, 3)),
    ],
)
def test_rows_or_room_that_do_not_fit_are_refused(x: Tensor, out: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"rows|room"):
        multiply(LEVELS_HERE[0], x, float_matrix(W), out)


@pytest.mark.parametrize(
    ("counts", "token_of"),
    [
        ((1,), (0,)),
        ((1, 1), (0, 1, 1)),
        ((3, -1), (0, 1)),
        ((1, 1), (0, 2)),
        ((1, 1), (-1, 0)),
        ((1, 2), None),
    ],
)
def test_call_whose_rows_do_not_fit_is_refused(counts: Sequence[int], token_of: Sequence[int] | None) -> None:
    experts = [expert for expert, _, _ in _experts(None, torch.float32, (8, 4), 2)]
    compute_gated(LEVELS_HERE[0], X, experts, (1, 1), (0, 1))
    with pytest.raises(ValueError, match="rows"):
        compute_gated(LEVELS_HERE[0], X, experts, counts, token_of)


def test_experts_that_do_not_fit_each_other_are_refused() -> None:
    small, large = (
        _experts(None, torch.float32, (8, 4), 1)[0][0],
        _experts(None, torch.float32, (8, 5), 1)[0][0],
    )
    with pytest.raises(ValueError, match="several forms"):
        compute_gated(LEVELS_HERE[0], X, [small, large], (1, 1))
    with pytest.raises(ValueError, match="do not fit"):
        gated_matrices(small.matrices[0], large.matrices[1])
    with pytest.raises(ValueError, match="bfloat16 rows"):
        compute_gated(LEVELS_HERE[0], X.bfloat16(), [small], (2,))


def test_environment_chooses_and_cannot_ask_for_what_is_not_there() -> None:
    assert chosen_level(torch.float32, {}) == LEVELS_HERE[-1]
    assert chosen_level(torch.float16, {}) is None
    assert chosen_level(torch.bfloat16, {VARIABLE: TORCH}) is None
    assert chosen_level(torch.bfloat16, {VARIABLE: "portable"}) == "portable"
    with pytest.raises(
        ProductsUnavailable, match=f"{VARIABLE}=avx9000 is not here; choose one of: torch, portable"
    ):
        chosen_level(torch.bfloat16, {VARIABLE: "avx9000"})


def test_level_that_the_processor_lacks_is_never_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUILT is not None
    lesser = replace(BUILT, best_level="portable")
    monkeypatch.setattr(native_products, "library", lambda: lesser)
    with pytest.raises(ValueError, match="level avx2"):
        multiply("avx2", X, float_matrix(W))


def test_library_that_is_missing_broken_or_old_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = library.__wrapped__
    monkeypatch.setattr(native_products, "LIBRARY", tmp_path / "none.so")
    assert fresh() is None
    (tmp_path / "none.so").write_bytes(b"no library")
    assert fresh() is None
    assert "cannot be loaded" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(native_products, "VERSION", 0)
    assert fresh() is None
    assert "install again" in caplog.text


def test_threads_are_those_of_pytorch() -> None:
    assert BUILT is not None
    if "OpenMP" in torch.__config__.parallel_info():
        assert BUILT.run_in_threads is not None


def test_nothing_is_built_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stale = tmp_path / "products.so"
    stale.write_bytes(b"old")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_build.build({}, stale) is None
    assert not stale.exists()
    assert "PyTorch's products will be used" in caplog.text


def test_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(
        native_build.shutil, "which", lambda name: str(compiler) if name == str(compiler) else None
    )
    assert native_build.build({"CC": str(compiler)}, tmp_path / "products.so") is None
    assert [path.name for path in tmp_path.iterdir()] == ["cc"]


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=st.tuples(st.integers(0, 5), st.integers(1, 70)), place=st.integers(0, 400), bad=st.booleans())
def test_values_are_finite_where_all_of_them_are(
    dtype: torch.dtype, shape: tuple[int, int], place: int, bad: bool
) -> None:
    values = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    values[::2] *= -1
    if bad and values.numel():
        values.view(-1)[place % values.numel()] = (torch.inf, -torch.inf, torch.nan)[place % 3]
    assert find_finite(values) == bool(torch.isfinite(values).all())


def test_finite_is_not_said_of_what_is_not_read() -> None:
    assert find_finite(torch.zeros(2, dtype=torch.float16)) is None
    assert find_finite(torch.zeros(4, 4)[:, :2]) is None
