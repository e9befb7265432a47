"""Layers in one call: the bits of one after another, and no further than somebody looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import router.backbone
from experts.native_products import chosen_level
from router.decoder_layer import MANY_ROWS
from router.kv_cache import KvPool
from router.layer_run import LONGEST_S, LayerRun, RunTimes
from router.loading import EngineOptions, LoadedEngine
from router.native_step import ATTENTION_PHASES, EXPERTS_PHASES, NativeStep
from router.prefetch import Prefetcher
from router.prompt_inputs import InputRows
from router.scoring import Routing
from router.step_batch import Span, StepBatch, StepOutput
from router.step_routing import RoutingWatcher, SpanOwner, StepRouting, View
from tests.engines import open_engine

if chosen_level(torch.float32) is None:
    pytest.skip("native products are not used here", allow_module_level=True)

NUM_LAYERS = 6
STEPS = (
    [Span((3, 7), 0, 70), Span((5,), 0, 1)],
    [Span((3, 7), 70, 1)],
    [Span((3, 7), 71, 1), Span((5,), 1, 1), Span((9, 1), 0, 20)],
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(stories_store: Path, request: pytest.FixtureRequest) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions(dtype=request.param))
    loaded.worker.load_all()
    for num_rows in range(MANY_ROWS):
        loaded.engine.backbone.run_times.note(num_rows, 1, 1e-6)
    yield loaded
    loaded.close()


class Looker(RoutingWatcher):
    """Wants some layers with their rows, and how the rows of the others were routed."""

    def __init__(self, layers: set[int]) -> None:
        self._view = View(layers, has_choices=True)
        self.seen: list[int] = []
        self.choices: dict[int, list[Routing]] = {}

    def wanted(self, owners: Sequence[SpanOwner]) -> View:
        return self._view

    def watch_choices(self, owners: Sequence[SpanOwner], layer: int, routing: Routing) -> None:
        self.seen.append(layer)
        self.choices.setdefault(layer, []).append(routing)

    def watch(self, owners: object, gate: object, routing: Routing, *rest: object) -> None:
        layer: int = gate.layer  # type: ignore[attr-defined]
        self.seen.append(layer)
        self.choices.setdefault(layer, []).append(routing)


class Clock:
    """Notes the phases of each half."""

    def __init__(self) -> None:
        self.attended_s: list[dict[str, float]] = []
        self.mixed_s: list[tuple[int, dict[str, float], list[int]]] = []

    def attended(self, step: NativeStep) -> None:
        self.attended_s.append(step.attention_s)

    def mixed(self, layer: int, step: NativeStep) -> None:
        self.mixed_s.append((layer, step.experts_s, step.chosen))


def _batch(spans: Sequence[Span], **more: object) -> StepBatch:
    positions = torch.tensor([p for span in spans for p in range(span.first, span.first + span.count)])
    ids, last = positions * 7 % 400 + 3, len(positions) - 1
    return StepBatch(tuple(spans), ids, positions.expand(3, -1), (last,), **more)  # type: ignore[arg-type]


def _forward(
    loaded: LoadedEngine, steps: Sequence[StepBatch], *, may_run: bool = True
) -> tuple[list[StepOutput], KvPool, list[list[range]]]:
    """Each step's output, the cache, and the layers of each of its runs."""
    backbone, runs = loaded.engine.backbone, list[list[range]]()
    pool = KvPool(loaded.config, 12, loaded.dtype)
    compute = router.backbone.compute_run

    def noted(run: LayerRun, *arguments: object) -> object:
        runs[-1].append(range(run.first, run.first + len(run.layers)))
        return compute(run, *arguments)  # type: ignore[arg-type]

    outputs = []
    with mock.patch.object(router.backbone, "compute_run", noted):
        for batch in steps:
            runs.append([])
            if may_run:
                outputs.append(backbone.forward(batch, pool))
            else:
                with mock.patch.object(router.backbone, "find_run", lambda *_: None):
                    outputs.append(backbone.forward(batch, pool))
    return outputs, pool, runs


def _counts(loaded: LoadedEngine) -> tuple[int, int, int]:
    stats = loaded.worker.stats
    return stats.calls, stats.rows, stats.hits


def _assert_same(
    found: tuple[list[StepOutput], KvPool, object], expected: tuple[list[StepOutput], KvPool, object]
) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one.logits_LV, other.logits_LV) and one.best_L == other.best_L
        assert one.captured.keys() == other.captured.keys()
        assert all(torch.equal(one.captured[layer], other.captured[layer]) for layer in one.captured)
    assert torch.equal(found[1].keys, expected[1].keys) and torch.equal(found[1].values, expected[1].values)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_call_has_the_bits_of_layer_after_layer_and_counts_the_same(
    loaded: LoadedEngine, threads: int
) -> None:
    before = torch.get_num_threads()
    batches = [_batch(spans) for spans in STEPS]
    try:
        torch.set_num_threads(1)
        counts = [_counts(loaded)]
        expected = _forward(loaded, batches, may_run=False)
        counts.append(_counts(loaded))
        torch.set_num_threads(threads)
        found = _forward(loaded, batches)
        counts.append(_counts(loaded))
    finally:
        torch.set_num_threads(before)
    assert expected[2] == [[], [], []] and found[2] == [[range(NUM_LAYERS)]] * 3
    _assert_same(found, expected)
    apart, together = (
        [now - then for then, now in zip(*pair, strict=True)] for pair in (counts[:2], counts[1:])
    )
    assert together == apart and apart[0] == 3 * NUM_LAYERS
    for output in found[0]:
        assert output.phase_seconds["attention"] > 0 and output.phase_seconds["experts"] > 0


def test_run_ends_where_rows_are_handed_out_changed_or_watched(loaded: LoadedEngine) -> None:
    generator = torch.Generator().manual_seed(1)
    added = (InputRows(0, torch.randn(1, loaded.config.hidden_size, generator=generator)),)
    looker, other = Looker({4}), Looker({4})

    def batches(watcher: Looker) -> list[StepBatch]:
        routing = StepRouting(watchers=(watcher,))
        return [
            _batch(STEPS[0], capture_layers=(0, 5)),
            _batch(STEPS[1], injections={2: added}),
            _batch(STEPS[2], routing=routing),
        ]

    expected = _forward(loaded, batches(other), may_run=False)
    with mock.patch.object(RunTimes, "most_layers", lambda self, num_rows: NUM_LAYERS):
        found = _forward(loaded, batches(looker))
    assert found[2] == [
        [range(1), range(1, 6)],
        [range(3), range(3, 6)],
        [range(4), range(5, 6)],
    ]
    _assert_same(found, expected)
    assert looker.seen == other.seen == list(range(NUM_LAYERS))
    for layer in range(NUM_LAYERS):
        for one, two in zip(looker.choices[layer], other.choices[layer], strict=True):
            assert torch.equal(one.experts_TK, two.experts_TK) and torch.equal(one.weights_TK, two.weights_TK)


def test_no_run_for_many_rows_with_a_prefetcher_or_with_experts_elsewhere(loaded: LoadedEngine) -> None:
    many = [Span((3, 7, 2), 0, MANY_ROWS)]
    assert _forward(loaded, [_batch(many)])[2] == [[]]
    few = [_batch(STEPS[1])]
    backbone = loaded.engine.backbone
    prefetcher = Prefetcher(backbone.layers, backbone.arithmetic, loaded.directory)
    with mock.patch.object(backbone, "prefetcher", prefetcher):
        assert _forward(loaded, few)[2] == [[]]
    tables = type(loaded.directory).table
    with mock.patch.object(
        type(loaded.directory), "table", lambda self, *at: None if at[1] == 2 else tables(self, *at)
    ):
        assert _forward(loaded, few)[2] == [[range(2), range(3, 6)]]
    policy = StepRouting(
        policy=mock.Mock(is_native=lambda owners: False, route=lambda owners, gate: gate.native())
    )
    assert _forward(loaded, [replace(few[0], routing=policy)])[2] == [[]]
    assert _forward(loaded, few)[2] == [[range(NUM_LAYERS)]]


def test_timed_run_tells_of_each_layer_in_order(loaded: LoadedEngine) -> None:
    def chosen(may_run: bool) -> Clock:
        clock = Clock()
        with mock.patch.object(loaded.engine.backbone.arithmetic, "clock", clock):
            _forward(loaded, [_batch(spans) for spans in STEPS], may_run=may_run)
        return clock

    apart, together = chosen(False), chosen(True)
    assert [(layer, experts) for layer, _, experts in together.mixed_s] == [
        (layer, experts) for layer, _, experts in apart.mixed_s
    ]
    assert len(together.attended_s) == 3 * NUM_LAYERS
    for attended_s, (_, mixed_s, _) in zip(together.attended_s, together.mixed_s, strict=True):
        assert tuple(attended_s) == ATTENTION_PHASES and tuple(mixed_s) == EXPERTS_PHASES
        assert all(0 <= seconds < 1 for seconds in (*attended_s.values(), *mixed_s.values()))


def test_what_does_not_fit_a_run_is_refused(loaded: LoadedEngine) -> None:
    backbone = loaded.engine.backbone
    step = backbone.arithmetic.prepare(_batch(STEPS[1])).native
    first = backbone.layers[0]
    assert step is not None and first.native is not None and first.moe is not None
    table = first.moe.table()
    assert table is not None
    rows: Tensor = torch.zeros(1, loaded.config.hidden_size, dtype=loaded.dtype)
    pool = KvPool(loaded.config, 12, loaded.dtype)
    layers = [(first.native, table)] * 2
    for at in (-1, NUM_LAYERS - 1, NUM_LAYERS):
        with pytest.raises(ValueError, match="no layer"):
            step.layers(at, layers, rows, pool)
    with pytest.raises(ValueError, match="expected"):
        step.layers(0, layers, rows[:, :-1], pool)
    with pytest.raises(ValueError, match="no block"):
        step.layers(0, layers, rows, KvPool(loaded.config, 3, loaded.dtype))
    with pytest.raises(ValueError, match="experts"):
        step.layers(0, [(first.native, replace(table, keys=table.keys[:3]))], rows, pool)


def test_run_is_one_layer_at_first_and_never_hides_progress_for_long() -> None:
    times = RunTimes()
    assert times.most_layers(100) == 1
    times.note(100, 4, 4 * LONGEST_S / 10)
    assert times.most_layers(100) == times.most_layers(64) == 10
    assert times.most_layers(1) == 1, "other numbers of rows take other times"
    times.note(100, 10, 100.0)
    assert times.most_layers(100) == 1


def test_slow_layers_are_computed_in_calls_of_their_own(loaded: LoadedEngine) -> None:
    times, step = loaded.engine.backbone.run_times, _batch([Span((3,), 0, 1)])
    times.note(1, 1, LONGEST_S / 2)
    with mock.patch.object(times, "note"):  # they are fast in truth
        _, _, runs = _forward(loaded, [step])
    times.note(1, 1, 1e-6)
    assert runs == [[range(2), range(2, 4), range(4, 6)]]
