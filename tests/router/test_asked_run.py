"""Layers whose experts are asked for: the bits of operation by operation, and what happens where asking fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import router.backbone
from experts.call import ExpertCall
from experts.directory import LocalDirectory
from experts.errors import ExpertUnavailable
from experts.expert_table import ExpertTable
from experts.native_products import LEVELS, chosen_level, library
from extraction.quantise import Quantization
from router.asked_run import AskedRun
from router.backbone import ForwardPass
from router.decoder_layer import LayerArithmetic
from router.dispatch import dispatch
from router.engine import TURN_S
from router.kv_cache import KvPool
from router.loading import EngineOptions, LoadedEngine
from router.native_dispatch import NativeDispatch
from router.prompt_inputs import InputRows
from router.request import GenerationRequest
from router.step_batch import Span, StepBatch
from router.step_routing import RoutingWatcher, StepRouting
from router.weights import Layer
from tests.engines import open_engine, small_engine
from tests.router.configs import tiny_config
from tests.router.test_layer_run import STEPS, Looker, _assert_same, _batch, _forward
from tests.router.test_native_layer import INT4, INT8, NUM_BLOCKS, Random
from tests.router.test_native_layer import _batch as _rows_of

BUILT = library()
if BUILT is None or chosen_level(torch.float32) is None:
    pytest.skip("native products are not used here", allow_module_level=True)
NUM_LAYERS = 6


class AskedDirectory(LocalDirectory):
    """Lets nobody compute by himself; fails where it is told to."""

    fails_at: int | None = None

    def table(self, component: str, layer: int) -> ExpertTable | None:
        return None

    def run(self, call: ExpertCall) -> Tensor:
        if call.layer == self.fails_at:
            raise ExpertUnavailable(call.component, call.layer, call.experts, 0.0, "a test")
        return super().run(call)


class Everything(RoutingWatcher):
    """Wants every layer with its rows, so that each goes operation by operation."""

    def watch(self, *shown: object) -> None:
        return


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(stories_store: Path, request: pytest.FixtureRequest) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions(dtype=request.param), AskedDirectory)
    yield loaded
    loaded.close()


def _runs(loaded: LoadedEngine, compute: Callable[[], object]) -> list[range]:
    """The layers of each run that is asked for meanwhile."""
    runs: list[range] = []
    finish = AskedRun.finish

    def noted(run: AskedRun) -> Tensor:
        runs.append(range(run.first, run.first + len(run.layers)))
        return finish(run)

    with mock.patch.object(AskedRun, "finish", noted):
        compute()
    return runs


@pytest.mark.parametrize("threads", [1, 2])
def test_asked_run_has_the_bits_of_operation_by_operation(loaded: LoadedEngine, threads: int) -> None:
    watched = StepRouting(watchers=(Everything(),))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = _forward(loaded, [_batch(spans, routing=watched) for spans in STEPS])
        torch.set_num_threads(threads)
        batches = [_batch(spans) for spans in STEPS]
        found = _forward(loaded, batches)
        with mock.patch.object(router.backbone, "find_asked_run", lambda *_: None):
            layer_by_layer = _forward(loaded, batches)
    finally:
        torch.set_num_threads(before)
    _assert_same(found, expected)
    _assert_same(layer_by_layer, expected)
    for output in found[0]:
        assert output.phase_seconds["attention"] > 0 and output.phase_seconds["experts"] > 0


def test_pass_alone_asks_for_no_more_layers_than_somebody_who_comes_may_wait_for(
    loaded: LoadedEngine,
) -> None:
    engine = small_engine(loaded, 8)
    engine.limits = replace(engine.limits, is_paced=True)
    engine.is_called = lambda: True
    engine.submit(GenerationRequest("r", tuple(range(20))))
    assert _runs(loaded, engine.step) == [], "what a layer takes is not known"
    engine.cancel("r")
    engine.pace.note_layer(20, 0.45 * TURN_S)
    engine.submit(GenerationRequest("r", tuple(range(20))))
    assert _runs(loaded, engine.step) == [range(2)]
    engine.cancel("r")


def test_asked_run_ends_where_rows_are_handed_out_changed_or_watched(loaded: LoadedEngine) -> None:
    row = torch.randn(1, loaded.config.hidden_size, generator=torch.Generator().manual_seed(1))
    added = (InputRows(0, row),)

    def batches(*watchers: RoutingWatcher) -> list[StepBatch]:
        return [
            _batch(STEPS[0], capture_layers=(0, 5), routing=StepRouting(watchers=watchers[1:])),
            _batch(STEPS[1], injections={2: added}, routing=StepRouting(watchers=watchers[1:])),
            _batch(STEPS[2], routing=StepRouting(watchers=watchers)),
        ]

    looker, other = Looker({4}), Looker({4})
    expected = _forward(loaded, batches(other, Everything()))
    found: list[object] = []
    runs = _runs(loaded, lambda: found.append(_forward(loaded, batches(looker))))
    assert runs == [range(1), range(1, 6), range(3), range(3, 6), range(4), range(5, 6)]
    _assert_same(found[0], expected)  # type: ignore[arg-type]
    assert looker.seen == list(range(NUM_LAYERS))
    for layer in range(NUM_LAYERS):
        one, two = looker.choices[layer][0], other.choices[layer][0]
        assert torch.equal(one.experts_TK, two.experts_TK) and torch.equal(one.weights_TK, two.weights_TK)


def test_step_that_failed_in_the_middle_is_computed_again_with_the_same_bits(loaded: LoadedEngine) -> None:
    directory, backbone = loaded.directory, loaded.engine.backbone
    assert isinstance(directory, AskedDirectory)
    expected = _forward(loaded, [_batch(spans) for spans in STEPS])
    pool = KvPool(loaded.config, 12, loaded.dtype)
    outputs = []
    for spans in STEPS:
        directory.fails_at = 3
        with pytest.raises(ExpertUnavailable):
            backbone.forward(_batch(spans), pool)
        directory.fails_at = None
        outputs.append(backbone.forward(_batch(spans), pool))
    _assert_same((outputs, pool, None), expected)


def test_layers_that_ask_are_no_longer_in_one_call_for_a_quick_one_without_experts(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"), AskedDirectory)
    backbone, compute, most_layers = loaded.engine.backbone, AskedRun.compute, list[int]()

    def noted(run: AskedRun, hidden_TD: Tensor, pool: KvPool, most: int) -> object:
        most_layers.append(most)
        return compute(run, hidden_TD, pool, most)

    expected = _forward(loaded, [_batch(STEPS[1], routing=StepRouting(watchers=(Everything(),)))])
    backbone.run_times.note(1, 1, 1e-6)
    with mock.patch.object(AskedRun, "compute", noted), mock.patch.object(backbone.asked_times, "note"):
        found = _forward(loaded, [_batch(STEPS[1])])
    _assert_same(found, expected)
    assert found[2] == [[range(1, 2)]] and most_layers == [1, 1], "what they take is not known"
    loaded.close()


def test_pass_that_pauses_wherever_it_can_has_the_same_bits(loaded: LoadedEngine) -> None:
    """In gate and sort, between any two experts, and in their sum."""
    expected = _forward(loaded, [_batch(spans) for spans in STEPS])
    pool, outputs, paused = KvPool(loaded.config, 12, loaded.dtype), [], list[str]()
    with ExitStack() as stack:
        for name in ("dispatch", "combine"):
            stack.enter_context(mock.patch.object(NativeDispatch, name, _noting(name, paused)))
        for spans in STEPS:
            forward = ForwardPass(loaded.engine.backbone, _batch(spans))
            while not forward.is_done:
                forward.advance(pool, 1)
            outputs.append(forward.finish())
    _assert_same((outputs, pool, None), expected)
    assert paused.count("dispatch") > 3 * NUM_LAYERS and paused.count("combine") > NUM_LAYERS


def _noting(name: str, paused: list[str]) -> Callable[..., object]:
    """A method of NativeDispatch that notes when it pauses."""
    method = getattr(NativeDispatch, name)

    def noted(*arguments: object) -> object:
        found = method(*arguments)
        if found is None:
            paused.append(name)
        return found

    return noted


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(BUILT.best_level) + 1])
@given(
    num_tokens=st.integers(1, 64),
    num_experts=st.sampled_from([1, 5, 64]),
    top_k=st.sampled_from([1, 3, 8]),
    width=st.sampled_from([34, 64, 130]),
    forms=st.sampled_from([(None, None), (None, INT4), (INT8, INT8), (INT4, None)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    normalises=st.booleans(),
    shared_width=st.sampled_from([None, 30, 130]),
)
@settings(max_examples=20, deadline=None)
def test_reached_layers_have_the_bits_and_the_calls_of_operation_by_operation(
    level: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    width: int,
    forms: tuple[Quantization | None, Quantization | None],
    dtype: torch.dtype,
    normalises: bool,
    shared_width: int | None,
) -> None:
    config = tiny_config(
        hidden_size=width,
        num_experts=num_experts,
        num_experts_per_tok=min(top_k, num_experts),
        norm_topk_prob=normalises,
    )
    config = replace(config, shared_width=shared_width)
    weights = Random(config, level, dtype, seed=num_tokens)
    layers = [weights.layer(*forms, has_table=False) for _ in range(2)]
    hidden = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    batch = _rows_of([Span((3,), 0, num_tokens)])
    expected, calls = _operation_by_operation(weights, layers, batch, hidden)
    step = LayerArithmetic(config, weights.kernel, dtype).prepare(batch).native
    assert step is not None
    step.bind(KvPool(config, NUM_BLOCKS, dtype), 0, 1)
    native, rows = NativeDispatch(step), None
    for index, layer in enumerate(layers):
        assert layer.native is not None and layer.moe is not None
        call = native.reach(layer.native, layer.moe, index, hidden, rows, "trace")
        call.validate()
        assert call[:5] == calls[index][:5] and torch.equal(call.tokens_TD, calls[index].tokens_TD)
        rows = layer.moe.directory.run(call)
    assert rows is not None and torch.equal(native.combine(rows), expected)


def _operation_by_operation(
    weights: Random, layers: Sequence[Layer], batch: StepBatch, hidden: Tensor
) -> tuple[Tensor, list[ExpertCall]]:
    arithmetic = LayerArithmetic(weights.config, weights.kernel, weights.dtype)
    pool = KvPool(weights.config, NUM_BLOCKS, weights.dtype)
    calls = []
    for index, layer in enumerate(layers):
        apart = Layer(**(vars(layer) | {"native": None}))
        inputs = arithmetic.prepare(batch)
        attended = arithmetic.attention(index, apart, hidden, inputs, pool)
        assert attended is not None and layer.moe is not None
        normed = arithmetic.norm(attended, layer.post_norm_D)
        gate = layer.moe.gate(normed, batch.num_tokens)
        calls.append(dispatch("model", 0, gate.hidden_TD, gate.native()).call)
        mixed = arithmetic.feed_forward(apart, attended, inputs)
        assert mixed is not None
        hidden = mixed
    return hidden, calls


def test_rows_that_do_not_fit_are_refused() -> None:
    config = tiny_config()
    weights = Random(config, LEVELS[0], torch.bfloat16, seed=1)
    layer = weights.layer(None, None, has_table=False)
    assert layer.native is not None and layer.moe is not None
    batch = _rows_of([Span((3,), 0, 4)])
    step = LayerArithmetic(config, weights.kernel, torch.bfloat16).prepare(batch).native
    assert step is not None
    step.bind(KvPool(config, NUM_BLOCKS, torch.bfloat16), 0, 1)
    native, hidden = NativeDispatch(step), torch.zeros(4, config.hidden_size, dtype=torch.bfloat16)
    for wrong in (hidden[:3], hidden.float(), hidden.t().contiguous().t()):
        with pytest.raises(ValueError, match="expected"):
            native.dispatch(layer.native, layer.moe, wrong, "")
        with pytest.raises(ValueError, match="expected"):
            native.reach(layer.native, layer.moe, 0, wrong, None, "")
    call = native.reach(layer.native, layer.moe, 0, hidden, None, "")
    rows = layer.moe.directory.run(call)
    for wrong in (rows[:-1], rows.float(), torch.cat((rows, rows))):
        with pytest.raises(ValueError, match="expected"):
            native.combine(wrong)
        with pytest.raises(ValueError, match="expected"):
            native.reach(layer.native, layer.moe, 1, hidden, wrong, "")
    assert native.combine(rows).shape == hidden.shape
