"""A layer in two calls: bit by bit what one call for each operation gives, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.call import ExpertCall
from experts.expert_table import ExpertTable
from experts.ffn import ExpertWeights, compute_experts
from experts.native_products import LEVELS, library
from experts.numerics import RowKernel
from experts.packed_matrix import CanonicalMatrix, Weight, take_as_it_is
from extraction.manifest import ExpertKey
from extraction.quantise import Quantization
from router.decoder_layer import LayerArithmetic
from router.kv_cache import KvPool
from router.model_config import ModelConfig
from router.moe_block import MoeBlock
from router.native_layer import NativeLayer
from router.shared_expert import SharedExpert, padded_gate
from router.step_batch import Span, StepBatch
from router.weights import Layer, as_native
from tests.router.configs import tiny_config

BUILT = library()
if BUILT is None:
    pytest.skip("native products are not built here", allow_module_level=True)
LEVELS_HERE = LEVELS[: LEVELS.index(BUILT.best_level) + 1]
INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
NUM_BLOCKS = 12


@dataclass
class Here:
    """Experts in memory for good, and whether a caller may know."""

    experts: list[ExpertWeights]
    kernel: RowKernel
    has_table: bool
    used: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    foreign_rows = num_quarantined = 0

    def run(self, call: ExpertCall) -> Tensor:
        self.used.append((call.experts, call.num_rows))
        return compute_experts(call, [self.experts[expert] for expert in call.experts], self.kernel)

    def table(self, component: str, layer: int) -> ExpertTable | None:
        keys = [ExpertKey(component, layer, expert) for expert in range(len(self.experts))]
        natives = [expert.native for expert in self.experts if expert.native is not None]
        return ExpertTable.of(keys, natives) if self.has_table else None

    def load_more(self) -> bool:
        return False

    def note_use(self, table: ExpertTable, used: Sequence[int], num_rows: int) -> None:
        self.used.append((tuple(used), num_rows))


class Random:
    """Weights of one layer."""

    def __init__(self, config: ModelConfig, level: str, dtype: torch.dtype, seed: int) -> None:
        self.config, self.dtype, self.kernel = config, dtype, RowKernel(1, "native", level)
        self._generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).mul_(shape[-1] ** -0.5).to(self.dtype)

    def norm(self, size: int) -> Tensor:
        return torch.rand(size, generator=self._generator).add_(0.5).to(self.dtype)

    def weight(self, outputs: int, inputs: int, form: Quantization | None) -> Weight:
        if form is None:
            return self.floats(outputs, inputs)
        shape = (outputs, inputs)
        codes = torch.randint(256, form.code_shape(shape), generator=self._generator, dtype=torch.uint8)
        scales = torch.rand(form.scale_shape(shape), generator=self._generator).mul_(0.02).bfloat16()
        return take_as_it_is(CanonicalMatrix(codes, scales, inputs, form), self.kernel)

    def layer(self, backbone: Quantization | None, experts: Quantization | None, *, has_table: bool) -> Layer:
        config = self.config
        width, inner = config.hidden_size, config.expert_width
        here = Here(
            [
                ExpertWeights(self.weight(2 * inner, width, experts), self.weight(width, inner, experts))
                for _ in range(config.num_experts)
            ],
            self.kernel,
            has_table,
        )
        gate_ED = self.floats(config.num_experts, width).mul_(3)
        q_norm, k_norm = self.norms_of_heads()
        layer = Layer(
            input_norm_D=self.norm(width),
            qkv_OD=self.weight(config.q_width + 2 * config.kv_width, width, backbone),
            qkv_bias_O=self.norm(config.q_width + 2 * config.kv_width) if config.has_qkv_bias else None,
            q_norm=q_norm,
            k_norm=k_norm,
            output_DO=self.weight(width, config.q_width, backbone),
            output_bias_D=self.norm(width) if config.has_output_bias else None,
            post_norm_D=self.norm(width),
            moe=MoeBlock("model", 0, gate_ED, config, self.kernel, here, self.shared(backbone)),  # type: ignore[arg-type]
            dense=None,
        )
        native = as_native(layer, config, self.kernel)
        assert native is not None
        return replace(layer, native=native)

    def norms_of_heads(self) -> tuple[Tensor | None, Tensor | None]:
        config = self.config
        if config.qk_norm == "none":
            return None, None
        is_wide = config.qk_norm == "whole_width"
        sizes = (config.q_width, config.kv_width) if is_wide else (config.head_dim, config.head_dim)
        return self.norm(sizes[0]), self.norm(sizes[1])

    def shared(self, form: Quantization | None) -> SharedExpert | None:
        width, inner = self.config.hidden_size, self.config.shared_width
        if inner is None:
            return None
        weights = ExpertWeights(self.weight(2 * inner, width, form), self.weight(width, inner, form))
        return SharedExpert(weights, padded_gate(self.floats(1, width).mul_(3)), self.kernel)


def _batch(spans: Sequence[Span]) -> StepBatch:
    positions = torch.tensor([p for span in spans for p in range(span.first, span.first + span.count)])
    return StepBatch(tuple(spans), torch.zeros_like(positions), positions.expand(3, -1), ())


def _run(
    weights: Random, layer: Layer, steps: Sequence[Sequence[Span]], until_ns: int | None = None
) -> tuple[list[Tensor], KvPool]:
    """The layer's rows of each step, one step after another over one cache. until_ns: pausing wherever it can after."""
    arithmetic = LayerArithmetic(weights.config, weights.kernel, weights.dtype)
    pool = KvPool(weights.config, NUM_BLOCKS, weights.dtype)
    outs = []
    for spans in steps:
        batch = _batch(spans)
        generator = torch.Generator().manual_seed(batch.num_tokens)
        hidden = torch.randn(batch.num_tokens, weights.config.hidden_size, generator=generator)
        inputs = arithmetic.prepare(batch)
        attend = partial(arithmetic.attention, 1, layer, hidden.to(weights.dtype), inputs, pool, until_ns)
        attended = _finish(attend, until_ns)
        mix = partial(arithmetic.feed_forward, layer, attended, inputs, until_ns)
        outs += [attended, _finish(mix, until_ns)]
    return outs, pool


def _finish(compute: Callable[[], Tensor | None], until_ns: int | None) -> Tensor:
    """Call again until it is done; it pauses at least once where it may."""
    num_pauses = 0
    while (found := compute()) is None:
        num_pauses += 1
    assert num_pauses == 0 or until_ns is not None
    return found


STEPS = (
    [Span((3, 7), 0, 70), Span((5,), 0, 1)],
    [Span((3, 7), 70, 1)],
    [Span((3, 7), 71, 1), Span((5,), 1, 1), Span((9, 1), 0, 20)],
)
shapes = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([34, 64, 130]),
        "head_dim": st.sampled_from([16, 30]),
        "num_experts": st.sampled_from([1, 8, 50]),
        "num_experts_per_tok": st.sampled_from([1, 2, 6]),
        "moe_intermediate_size": st.sampled_from([24, 35, 66]),
        "norm_topk_prob": st.booleans(),
    }
)


@pytest.mark.parametrize("level", LEVELS_HERE)
@given(
    shape=shapes,
    forms=st.sampled_from([(None, None), (None, INT4), (INT8, INT8), (INT4, INT4), (INT4, None)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 9]),
    family=st.fixed_dictionaries(
        {
            "qk_norm": st.sampled_from(["per_head", "none", "whole_width"]),
            "clip_qkv": st.sampled_from([None, 0.3]),
            "has_qkv_bias": st.booleans(),
            "has_output_bias": st.booleans(),
            "shared_width": st.sampled_from([None, 30, 130]),
        }
    ),
    threads=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_two_calls_have_the_bits_of_one_for_each_operation(
    level: str,
    shape: dict[str, int],
    forms: tuple[Quantization | None, Quantization | None],
    dtype: torch.dtype,
    window: int | None,
    family: dict[str, Any],
    threads: int,
) -> None:
    shape = shape | {"num_experts_per_tok": min(shape["num_experts_per_tok"], shape["num_experts"])}
    windowed = frozenset({1} if window else ())
    config = replace(tiny_config(**shape), sliding_window=window, windowed_layers=windowed, **family)
    weights = Random(config, level, dtype, seed=3)
    layer = weights.layer(*forms, has_table=True)
    assert layer.moe is not None
    here = layer.moe.directory
    assert isinstance(here, Here)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        apart = replace(layer, native=None)
        expected, expected_pool = _run(weights, apart, STEPS)
        calls, here.used = here.used, []
        torch.set_num_threads(threads)
        found, pool = _run(weights, layer, STEPS)
        assert here.used == calls
        in_pieces, pool_of_pieces = _run(weights, layer, STEPS, until_ns=1)
        here.has_table = False  # the first half in one call, the second one call by call
        half, _ = _run(weights, layer, STEPS)
    finally:
        torch.set_num_threads(before)
    for others in (found, in_pieces, half):
        assert all(map(torch.equal, others, expected))
    for other in (pool, pool_of_pieces):
        assert torch.equal(other.keys, expected_pool.keys) and torch.equal(other.values, expected_pool.values)


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, INT8, INT4])
@pytest.mark.parametrize(("width", "inner"), [(48, 41), (52, 130)])
def test_layer_without_experts_has_the_bits_of_one_call_for_each_operation(
    level: str, dtype: torch.dtype, form: Quantization | None, width: int, inner: int
) -> None:
    weights = Random(replace(tiny_config(hidden_size=width), dense_width=inner), level, dtype, seed=4)
    dense = ExpertWeights(weights.weight(2 * inner, width, form), weights.weight(width, inner, form))
    layer = replace(weights.layer(form, None, has_table=True), moe=None, dense=dense)
    layer = replace(layer, native=as_native(layer, weights.config, weights.kernel))
    assert layer.native is not None
    expected, _ = _run(weights, replace(layer, native=None), STEPS)
    before = torch.get_num_threads()
    try:
        for until_ns, threads in ((None, 1), (None, 3), (1, 1)):
            torch.set_num_threads(threads)
            found, _ = _run(weights, layer, STEPS, until_ns)
            assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(before)


def test_layers_without_experts_and_with_them_go_in_one_call_with_the_same_bits() -> None:
    config = replace(tiny_config(num_hidden_layers=3), dense_width=41)
    weights = Random(config, LEVELS_HERE[-1], torch.bfloat16, seed=5)
    dense = ExpertWeights(weights.floats(2 * 41, config.hidden_size), weights.floats(config.hidden_size, 41))
    layers = [weights.layer(None, None, has_table=True) for _ in range(3)]
    layers[1] = replace(layers[1], moe=None, dense=dense)
    layers[1] = replace(layers[1], native=as_native(layers[1], config, weights.kernel))
    arithmetic = LayerArithmetic(config, weights.kernel, torch.bfloat16)
    batch = _batch([Span((3, 5), 0, 5), Span((2,), 0, 1)])
    hidden = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs, pool = arithmetic.prepare(batch), KvPool(config, NUM_BLOCKS, torch.bfloat16)
    expected = hidden
    for index, layer in enumerate(layers):
        attended = arithmetic.attention(index, replace(layer, native=None), expected, inputs, pool)
        assert attended is not None
        mixed = arithmetic.feed_forward(replace(layer, native=None), attended, inputs)
        assert mixed is not None
        expected = mixed
    native, other_pool = arithmetic.prepare(batch).native, KvPool(config, NUM_BLOCKS, torch.bfloat16)
    assert native is not None
    tables = [layer.moe and layer.moe.table() for layer in layers]
    of_run = [(layer.native, table) for layer, table in zip(layers, tables, strict=True)]
    found, _, _ = native.layers(0, [(one, table) for one, table in of_run if one], hidden, other_pool)
    assert torch.equal(found, expected)
    assert torch.equal(pool.keys, other_pool.keys) and torch.equal(pool.values, other_pool.values)
    for index in (0, 2):
        native.look_at(index)
        assert native.used
    with pytest.raises(ValueError, match="no layer without experts"):
        native.layers(0, [(one, None) for one, _ in of_run if one], hidden, other_pool)
    with pytest.raises(ValueError, match="no layer without experts"):
        native.dense(layers[0].native, hidden)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    config = tiny_config()
    weights = Random(config, LEVELS_HERE[-1], torch.bfloat16, seed=1)
    layer = weights.layer(None, None, has_table=True)
    native = layer.native
    assert native is not None and layer.moe is not None
    arithmetic = LayerArithmetic(config, weights.kernel, torch.bfloat16)
    step = arithmetic.prepare(_batch([Span((3,), 0, 4)])).native
    assert step is not None
    pool = KvPool(config, NUM_BLOCKS, torch.bfloat16)
    rows = torch.zeros(4, config.hidden_size, dtype=torch.bfloat16)
    for hidden in (rows[:3], rows.float(), rows.t().contiguous().t()):
        with pytest.raises(ValueError, match="expected"):
            step.attention(native, 0, hidden, pool)
    with pytest.raises(ValueError, match="no layer 2"):
        step.attention(native, 2, rows, pool)
    with pytest.raises(ValueError, match="no block"):
        step.attention(native, 0, rows, KvPool(config, 3, torch.bfloat16))
    table = layer.moe.table()
    assert table is not None
    with pytest.raises(ValueError, match="experts"):
        native.use(
            replace(table, keys=table.keys[:3]), config.hidden_size, config.num_experts, torch.bfloat16
        )
    with pytest.raises(ValueError, match="matrices of"):
        NativeLayer.of(
            replace(native.matrices, gate_ED=rows),
            replace(config, num_experts=5),
            weights.kernel,
            torch.bfloat16,
        )


def test_layer_that_a_library_s_products_compute_has_none() -> None:
    weights = Random(tiny_config(), LEVELS_HERE[-1], torch.float32, seed=1)
    native = weights.layer(None, None, has_table=True).native
    assert native is not None
    assert NativeLayer.of(native.matrices, weights.config, RowKernel(8), torch.float32) is None
