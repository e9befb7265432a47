"""Quantised experts in memory: against a slow plain reference, and the proof that chooses their product."""

from __future__ import annotations

import pytest
import torch

from experts import packed_matrix, quantised
from experts.call import ExpertCall
from experts.errors import NotRowInvariant, StoreDamaged
from experts.ffn import compute_experts
from experts.native_products import TORCH, VARIABLE, chosen_level
from experts.numerics import RowKernel, calibrate
from experts.packed_matrix import CanonicalMatrix, PackedMatrix, PackedProduct, pack
from experts.quantised import QuantisedForm, choose_product, expert_form, expert_shapes, product_suffix
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.extract import extract
from extraction.manifest import ExpertKey
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from tests.checkpoints import write_tiny_qwen3_moe

INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
SIZES = {"even": (64, 32), "odd": (52, 35)}
"""Model and expert width: what the kernels take as they are, and what has to be padded."""
SHAPES = [(48, 64), (64, 24)]
PRODUCTS: list[PackedProduct] = ["native", "pack", "dequantise"]
if chosen_level(torch.float32) is None:
    PRODUCTS.remove("native")


@pytest.fixture(scope="module", params=["even", "odd"])
def widths(request: pytest.FixtureRequest) -> tuple[int, int]:
    return SIZES[str(request.param)]


@pytest.fixture(scope="module", params=[INT8, INT4], ids=["int8", "int4"])
def store(
    request: pytest.FixtureRequest, widths: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> ExpertStore:
    folder = tmp_path_factory.mktemp("store")
    sizes = {"hidden_size": widths[0], "moe_intermediate_size": widths[1]}
    extract(
        write_tiny_qwen3_moe(folder / "checkpoint", **sizes),
        folder / "store",
        quantised=QuantisedParts(request.param),
    )
    return ExpertStore.open(folder / "store")


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = getattr(torch, str(request.param))
    return value


def _kernel(widths: tuple[int, int], dtype: torch.dtype) -> RowKernel:
    return calibrate([(2 * widths[1], widths[0]), widths], dtype)


def _plain(raw: torch.Tensor, widths: tuple[int, int], quantization: Quantization) -> list[torch.Tensor]:
    """Gate, up and down in float64, code by code as docs/store-format.md says."""
    data = bytes(raw.numpy().data)
    width, expert_width = widths
    shapes = [(expert_width, width), (expert_width, width), (width, expert_width)]
    codes_at, scales_at = 0, sum(map(quantization.code_bytes, shapes))
    matrices = []
    for outputs, inputs in shapes:
        matrix = torch.zeros(outputs, inputs, dtype=torch.float64)
        row_bytes, groups = quantization.code_shape((1, inputs))[1], quantization.num_scales(inputs)
        for row in range(outputs):
            for column in range(inputs):
                if quantization.group_size is None:
                    code, group = (data[codes_at + row * row_bytes + column] ^ 128) - 128, 0
                else:
                    byte = data[codes_at + row * row_bytes + column // 2]
                    code, group = (byte >> 4 * (column % 2) & 15) - 8, column // quantization.group_size
                at = scales_at + 2 * (row * groups + group)
                bits = int.from_bytes(data[at : at + 2], "little") << 16
                scale = torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)
                matrix[row, column] = code * float(scale)
        codes_at += outputs * row_bytes
        scales_at += 2 * outputs * groups
        matrices.append(matrix)
    return matrices


@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_are_those_of_the_plain_reference(
    store: ExpertStore, widths: tuple[int, int], dtype: torch.dtype, product: PackedProduct
) -> None:
    """Tolerance: the rounding of the dtype; an expert packed in a wrong order is off by its whole size."""
    quantization = store.manifest.quantization
    assert quantization is not None
    kernel = _kernel(widths, dtype)
    form = QuantisedForm(quantization, dtype, {"model": widths[0]}, kernel, product)
    key = ExpertKey("model", 1, 3)
    raw = store.read_expert(key)
    gate, up, down = _plain(raw, widths, quantization)
    tokens = torch.randn(5, widths[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    call = ExpertCall("model", 1, (3,), (5,), (0, 1, 2, 3, 4), tokens)
    rows = compute_experts(call, [form.weights(store.record(key), raw)], kernel)
    x = tokens.double()
    expected = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    assert (rows.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("product", PRODUCTS)
def test_bytes_counted_before_the_load_are_those_held_after_it(
    store: ExpertStore, widths: tuple[int, int], dtype: torch.dtype, product: PackedProduct
) -> None:
    quantization = store.manifest.quantization
    assert quantization is not None
    form = QuantisedForm(quantization, dtype, {"model": widths[0]}, _kernel(widths, dtype), product)
    record = store.record(ExpertKey("model", 0, 0))
    weights = form.weights(record, store.read_expert(record.key))
    storages = {}
    for matrix in (weights.gate_up_FD, weights.down_DF):
        assert isinstance(matrix, PackedMatrix)
        for tensor in (matrix.codes, matrix.scales):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert form.loaded_bytes(record) == sum(storages.values())


def test_worker_names_the_product_in_its_class_and_counts_packed_bytes(
    store: ExpertStore, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    quantization = store.manifest.quantization
    assert quantization is not None
    worker = ExpertWorker(store, _kernel(widths, dtype), dtype, widths={"model": widths[0]})
    assert worker.numerics_class.endswith(product_suffix(quantization, PRODUCTS[0]))
    worker.load_all()
    assert worker.num_resident == 16
    form = expert_form(store, _kernel(widths, dtype), dtype, {"model": widths[0]})
    assert worker.resident_bytes == 16 * form.loaded_bytes(store.record(ExpertKey("model", 0, 0)))


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=["int8", "int4"])
def test_wrong_packing_is_noticed_and_codes_are_dequantised_instead(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if codes had been packed for another instruction set: the same bytes in another order."""

    def shuffled(matrix: CanonicalMatrix, dtype: torch.dtype) -> PackedMatrix:
        packed = pack(matrix, dtype)
        return PackedMatrix(
            packed.shape, packed.quantization, packed.codes.flip(1).contiguous(), packed.scales, None
        )

    monkeypatch.setenv(VARIABLE, TORCH)
    kernel = calibrate(SHAPES, torch.float32)
    assert choose_product(SHAPES, quantization, torch.float32, kernel) == "pack"
    monkeypatch.setattr(quantised, "pack", shuffled)
    assert choose_product(SHAPES, quantization, torch.float32, kernel) == "dequantise"


def test_product_whose_rows_depend_on_their_number_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)
    kernel = calibrate(SHAPES, torch.float32)
    multiply = PackedMatrix.multiply

    def uneven(matrix: PackedMatrix, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return multiply(matrix, x, out).mul_(1 + 1e-6 * (x.shape[0] > 32 and matrix.kernel is None))

    monkeypatch.setattr(PackedMatrix, "multiply", uneven)
    assert choose_product(SHAPES, INT8, torch.float32, kernel) == "dequantise"


def test_machine_on_which_no_product_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: PackedMatrix, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(PackedMatrix, "multiply", fail)
    with pytest.raises(NotRowInvariant, match="int8 products"):
        choose_product(SHAPES, INT8, torch.float32, calibrate(SHAPES, torch.float32))


def test_matrix_of_many_rows_is_packed_like_one_packed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (592, 32), generator=generator, dtype=torch.uint8)
    matrix = CanonicalMatrix(codes, torch.ones(592, 2, dtype=torch.bfloat16), 64, INT4)
    in_blocks = pack(matrix, torch.float32)
    monkeypatch.setattr(packed_matrix, "ROWS_PACKED_AT_ONCE", 1024)
    assert torch.equal(pack(matrix, torch.float32).codes, in_blocks.codes)


def test_sizes_that_are_not_the_model_s_are_refused(store: ExpertStore, widths: tuple[int, int]) -> None:
    quantization = store.manifest.quantization
    assert quantization is not None
    record = store.record(ExpertKey("model", 0, 0))
    assert expert_shapes(record, quantization, widths[0]) == [(2 * widths[1], widths[0]), widths]
    with pytest.raises(StoreDamaged, match="does not have matrices"):
        expert_shapes(record, quantization, 53 if widths[0] == 52 else 70)
