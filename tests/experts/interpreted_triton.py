"""Our kernel of a device, computed by Triton's interpreter on tensors in host memory.

pytest collects this in a process of its own, which tests/experts/test_triton_products.py starts: whether kernels are
interpreted is decided once for a process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts import device_proof, quantised, triton_products
from experts.call import ExpertCall
from experts.device_proof import are_tiles_sound, sound_groupings
from experts.device_tier import TieredCache, TierOptions
from experts.devices import CPU
from experts.ffn import ExpertWeights, compute_experts, view_expert
from experts.numerics import LARGEST_ERRORS, TESTED_ROWS, RowKernel
from experts.packed_matrix import CanonicalMatrix, Weight, linear, multiply, take_for_device
from experts.store import ExpertStore
from experts.transfers import PlainTransfers
from experts.triton_kernels import TILES
from experts.triton_products import float_matrix
from experts.worker import ExpertWorker
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from tests.checkpoints import write_tiny
from tests.experts import triton_interpreter  # noqa: F401

BLOCKS = RowKernel(64, "blocks")
TILED = replace(BLOCKS, grouping="triton")
INT8 = Quantization(scheme="int8", group_size=None)
INT4 = [Quantization(scheme="int4", group_size=size) for size in (32, 64, 128)]
FORMS = (None, INT8, *INT4)
SHAPES = ((96, 128), (200, 50), (130, 131), (64, 256))
WIDTH, EXPERT_WIDTH = 128, 64
STORED_WIDTH = 64


@pytest.fixture(autouse=True)
def _has_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proofs: every row takes its time here."""
    monkeypatch.setattr(device_proof, "NUM_ROWS", 128)


@pytest.fixture
def _tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that may have the kernel."""
    for module in (device_proof, quantised):
        monkeypatch.setattr(module, "why_not_there", lambda *_: None)


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _matrix(form: Quantization | None, shape: tuple[int, int], seed: int = 1) -> tuple[Weight, Tensor]:
    """And its values in float64."""
    if form is None:
        values = _numbers(seed, *shape).mul_(shape[1] ** -0.5).bfloat16()
        return values, values.double()
    codes = torch.randint(
        256, form.code_shape(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    scales = _numbers(seed + 1, *form.scale_shape(shape)).mul_(0.01).bfloat16()
    canonical = CanonicalMatrix(codes, scales, shape[1], form)
    return take_for_device(canonical, TILED), canonical.dequantised().double()


def _product(x_RI: Tensor, matrix: Weight) -> Tensor:
    """By our kernel, whatever the matrix is."""
    if isinstance(matrix, Tensor):
        return triton_products.multiply(x_RI, float_matrix(matrix))
    return multiply(TILED, x_RI, matrix)


def _assert_close(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).abs().max()
    assert error <= LARGEST_ERRORS[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name if form else "bfloat16")
def test_product_is_close_to_a_plain_one_and_every_row_is_by_itself(
    form: Quantization | None, shape: tuple[int, int]
) -> None:
    matrix, values = _matrix(form, shape)
    x = _numbers(5, 70, shape[1]).bfloat16()
    whole = _product(x, matrix)
    _assert_close(whole, x.double() @ values.t())
    for first, count in ((0, 33), (37, 33), (1, 69), (20, 17), (3, 16), (5, 1), (68, 2)):
        assert torch.equal(_product(x[first : first + count], matrix), whole[first : first + count])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name if form else "bfloat16")
def test_both_tiles_compute_exact_sums_exactly(form: Quantization | None) -> None:
    """Of whole numbers no order of summation is to be seen, but every mistake in an index is."""
    shape = (136, 256)
    if form is None:
        matrix: Weight = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        values = matrix.double()
    else:
        codes = torch.randint(
            256, form.code_shape(shape), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
        )
        canonical = CanonicalMatrix(
            codes, torch.full(form.scale_shape(shape), 2.0**-12).bfloat16(), shape[1], form
        )
        matrix, values = take_for_device(canonical, TILED), canonical.dequantised().double()
    x = torch.randint(-2, 3, (40, shape[1]), generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = x.double() @ values.t()
    found = _product(x, matrix)
    assert (found.double() - expected).abs().max() <= 2.0**-7 * expected.abs().max()
    parts = [_product(rows, matrix) for rows in torch.split(x, 8)]
    assert torch.equal(found, torch.cat(parts)), "by tiles of few rows and of many"


def test_a_given_output_is_written_to_wherever_it_lies() -> None:
    matrix, _ = _matrix(INT4[0], (96, 64))
    x = _numbers(1, 20, 64).bfloat16()
    expected = _product(x, matrix)
    wide = torch.zeros(20, 100, dtype=torch.bfloat16)
    for out in (torch.empty_like(expected), wide[:, 2:98]):
        assert multiply(TILED, x, matrix, out) is out and torch.equal(out, expected)
    assert not wide[:, :2].any() and not wide[:, 98:].any()
    assert _product(x[:0], matrix).shape == (0, 96)
    assert torch.equal(linear(TILED, x[:3], matrix), expected[:3]), "padded to the row kernel's multiple"


def _experts(form: Quantization | None, count: int = 7) -> list[ExpertWeights]:
    if form is None:
        records = _numbers(3, count, 3 * WIDTH * EXPERT_WIDTH).mul_(0.1).bfloat16().view(torch.uint8)
        return [view_expert(record.clone(), torch.bfloat16, WIDTH) for record in records]
    shapes = ((2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH))
    return [
        ExpertWeights(*(_matrix(form, shape, 10 * place)[0] for shape in shapes)) for place in range(count)
    ]


def _call(counts: Sequence[int], seed: int = 1, width: int = WIDTH) -> ExpertCall:
    chance = random.Random(seed)
    rows = tuple(chance.randrange(9) for _ in range(sum(counts)))
    tokens_TD = _numbers(seed, 9, width).bfloat16()
    return ExpertCall("model", 0, tuple(range(len(counts))), tuple(counts), rows, tokens_TD)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name if form else "bfloat16")
def test_all_experts_of_a_call_get_what_each_gets_by_itself(form: Quantization | None) -> None:
    experts = _experts(form)
    for counts in ((3, 70, 1, 16, 17, 32, 5), (1, 2, 16, 3, 1, 1, 9), (33,)):
        call = _call(counts)
        found = compute_experts(call, experts[: len(counts)], TILED)
        plain = compute_experts(call, experts[: len(counts)], BLOCKS)
        _assert_close(found, plain.double())
        start = 0
        for count, expert in zip(counts, experts, strict=False):
            rows = call.token_of_R[start : start + count]
            tokens_TD = call.tokens_TD
            one = ExpertCall("model", 0, (0,), (count,), rows, tokens_TD)
            alone = compute_experts(one, [expert], TILED)
            assert torch.equal(found[start : start + count], alone), "maybe by a tile of another size"
            start += count


def test_tiles_are_those_of_each_expert_s_rows() -> None:
    assert triton_products.list_tiles((3, 0, 40, 16), 16) == [
        (0, 0, 3),
        *((2, 3, 43), (2, 19, 43), (2, 35, 43)),
        (3, 43, 59),
    ]


@pytest.mark.usefixtures("_tried")
def test_kernel_is_found_sound_and_named() -> None:
    groupings = sound_groupings(WIDTH, EXPERT_WIDTH, BLOCKS, torch.bfloat16)
    assert next(groupings) == "triton"
    assert TILED.name == f"blocks64-triton{triton_products.triton_version()}-1"


@pytest.mark.parametrize("form", FORMS[1:3], ids=lambda form: form.name if form else "")
def test_experts_as_codes_are_found_sound(form: Quantization) -> None:
    shapes = [(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)]
    assert quantised._is_proven("triton", shapes[0], form, torch.bfloat16, TILED)
    assert quantised._is_grouping_proven(shapes, form, torch.bfloat16, TILED)


def _spoil(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A kernel whose rows know of others, or one that is wrong, or one that does not start."""
    right = triton_products.compute_gated

    def compute_gated(
        tokens_TD: Tensor, counts: Sequence[int], token_of_R: Sequence[int], experts: Sequence[object]
    ) -> Tensor:
        if how in ("fails", "is full"):
            raise (RuntimeError if how == "fails" else torch.OutOfMemoryError)("not here")
        answers = right(tokens_TD, counts, token_of_R, experts)  # type: ignore[arg-type]
        if how == "is wrong":
            return answers * 1.1
        if how == "knows of other experts":
            return answers * (1 + 2.0**-6 * (len(counts) > 1))
        if how == "knows of few rows":
            return answers * (1 + 2.0**-6 * (max(counts) <= 3))
        return answers

    monkeypatch.setattr(device_proof, "compute_gated", compute_gated)


@pytest.mark.parametrize("how", ["fails", "is wrong", "knows of other experts", "knows of few rows"])
def test_a_kernel_that_does_not_keep_the_promise_is_refused(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    experts = _experts(None, device_proof.GROUPS)
    assert are_tiles_sound(experts, TILED, torch.bfloat16)
    _spoil(monkeypatch, how)
    assert not are_tiles_sound(experts, TILED, torch.bfloat16)


@pytest.mark.usefixtures("_tried")
def test_a_refused_kernel_leaves_the_ways_that_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(monkeypatch, "knows of other experts")
    assert "triton" not in list(sound_groupings(WIDTH, EXPERT_WIDTH, BLOCKS, torch.bfloat16))
    _spoil(monkeypatch, "is full")
    with pytest.raises(torch.OutOfMemoryError):  # a moment's, which must not decide between two classes
        next(sound_groupings(WIDTH, EXPERT_WIDTH, BLOCKS, torch.bfloat16))


@pytest.fixture(scope="module", params=FORMS[:3], ids=lambda form: form.name if form else "bfloat16")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExpertStore]:
    folder = tmp_path_factory.mktemp("triton")
    checkpoint = write_tiny("qwen3_moe", folder / "checkpoint")
    parts = {} if request.param is None else {"quantised": QuantisedParts(experts=request.param)}
    extract(checkpoint, folder / "store", **parts)
    opened = ExpertStore.open(folder / "store")
    yield opened
    opened.close()


def test_budgets_change_no_bit_and_nothing_is_held_twice(
    store: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "choose_product", lambda *_: "triton")
    monkeypatch.setattr(quantised, "_is_grouping_proven", lambda *_: True)
    one = max(store.record(key).nbytes for key in store.expert_keys())
    expected: list[Tensor] = []
    for num_experts in (None, 1, 3):
        budget = None if num_experts is None else num_experts * one
        worker = ExpertWorker(
            store,
            TILED,
            torch.bfloat16,
            widths={"model": STORED_WIDTH},
            budget_bytes=budget,
            tiers=TierOptions(PlainTransfers(CPU)),
        )
        cache = worker.cache
        assert isinstance(cache, TieredCache)
        answers = [worker.compute(_call((3, 16, 1, 5), seed, STORED_WIDTH)) for seed in range(3)]
        assert budget is None or cache.allocated_bytes <= budget
        assert all(expert.tiled is not None for expert in cache.weights.values())
        expected = expected or answers
        assert all(map(torch.equal, answers, expected))
        kind = worker.numerics_class.split("/")[4:]
        assert kind[0] == TILED.name and (len(kind) == 1 or kind[2].startswith("triton"))
        worker.close()


def test_few_rows_and_odd_matrices_are_multiplied_by_small_tiles() -> None:
    even = float_matrix(torch.zeros(8, 128, dtype=torch.bfloat16))
    odd = float_matrix(torch.zeros(8, 120, dtype=torch.bfloat16))
    for count in TESTED_ROWS:
        expected = TILES[count > TILES[0].rows]
        assert triton_products.choose_tile([1, count], [even]) == expected
        assert triton_products.choose_tile([1, count], [even, odd]) == TILES[0]
