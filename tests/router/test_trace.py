"""A trace holds every token's experts and weights, prompt included; it appears whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from router import trace, trace_file
from router.batcher import BatchLimits
from router.dispatch import Dispatch
from router.errors import TraceFailed
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from router.scoring import ABSENT, Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner
from router.trace import RoutedLayer, RoutingTrace, to_batches
from router.trace_file import TraceFacts, TraceFile, trace_schema
from router.trace_reader import read_trace
from tests.engines import open_engine, run_to_end

FACTS = TraceFacts("0" * 64, "model", "native", 3, 8, 2, "cpu/test", "1.0", has_tokens=True)
REQUESTS = [
    GenerationRequest("a", (1, 2, 3, 4, 5), SamplingParams(max_tokens=3, temperature=0.0)),
    GenerationRequest("b", (7, 8), SamplingParams(max_tokens=4, temperature=0.0)),
]


class _Notes(RoutingWatcher):
    """The slow way: one entry a token and layer."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], tuple[list[int], list[float]]] = {}

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        row = 0
        for owner in owners:
            for position in range(owner.first, owner.first + owner.count):
                place = (owner.request.request_id, position, gate.layer)
                self.rows[place] = (routing.experts_TK[row].tolist(), routing.weights_TK[row].tolist())
                row += 1


def test_trace_holds_what_every_token_was_given(tiny_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions(limits=BatchLimits(max_batch_tokens=4)))
    notes, writer = _Notes(), RoutingTrace.to_file(tmp_path / "trace.parquet", FACTS)
    loaded.engine.watchers = (notes, writer)
    outcome = run_to_end(loaded.engine, REQUESTS)
    loaded.close()
    assert not (tmp_path / "trace.parquet").exists(), "it appears when it is whole"
    writer.close()
    table = read_trace(tmp_path / "trace.parquet")
    places = zip(table.requests_N, table.positions_N, table.layers_N, strict=True)
    found = {
        (table.names[request], int(position), int(layer)): (experts.tolist(), weights.tolist())
        for (request, position, layer), experts, weights in zip(
            places, table.experts_NK, table.weights_NK, strict=True
        )
    }
    assert found == notes.rows
    assert len(found) == (5 + 2 + 2 + 3) * 2, (
        "all prompt tokens, and all but the last of the answers, in two layers"
    )
    assert table.facts == FACTS
    text = {"a": [1, 2, 3, 4, 5, *outcome.tokens["a"]], "b": [7, 8, *outcome.tokens["b"]]}
    assert table.tokens_N is not None
    for request, position, token in zip(table.requests_N, table.positions_N, table.tokens_N, strict=True):
        assert text[table.names[request]][position] == token


def test_tokens_are_left_out_unless_wanted(tmp_path: Path) -> None:
    writer = RoutingTrace.to_file(tmp_path / "trace.parquet", replace(FACTS, has_tokens=False))
    _watch(writer, _routed("a", 0, 3))
    writer.close()
    table = read_trace(tmp_path / "trace.parquet")
    assert table.tokens_N is None
    assert "token" not in trace_schema(has_tokens=False).names


def test_token_with_fewer_experts_has_a_shorter_list() -> None:
    experts_TK = torch.tensor([[1, 2], [3, ABSENT]])
    routed = RoutedLayer(
        _owners("a", 0, 2), 1, Routing(experts_TK, torch.tensor([[0.75, 0.25], [1.0, 0.0]]), True)
    )
    (batch,) = to_batches([routed], has_tokens=True)
    assert batch["experts"].to_pylist() == [[1, 2], [3]]
    assert batch["weights"].to_pylist() == [[0.75, 0.25], [1.0]]


def test_folder_gets_parts_that_read_as_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "GROUP_ROWS", 4)
    monkeypatch.setattr(trace, "PART_ROWS", 8)
    monkeypatch.setattr(trace, "MAX_PENDING_ROWS", 8)
    writer = RoutingTrace.to_folder(tmp_path, "trace-1", FACTS)
    for step in range(10):
        _watch(writer, _routed("a", step * 4, 4))
    writer.close()
    assert len(list(tmp_path.glob("trace-1-*.parquet"))) >= 2
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"
    assert read_trace(tmp_path).positions_N.tolist() == list(range(40))


def test_old_part_is_finished_while_the_service_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "PART_AGE_S", 0.01)
    writer = RoutingTrace.to_folder(tmp_path, "trace-1", FACTS)
    _watch(writer, _routed("a", 0, 3))
    with writer._changed:
        assert writer._changed.wait_for(lambda: list(tmp_path.glob("trace-1-*.parquet")), timeout=60)
    writer.close()
    assert read_trace(tmp_path).positions_N.tolist() == [0, 1, 2]


def test_folder_without_traffic_stays_empty(tmp_path: Path) -> None:
    RoutingTrace.to_folder(tmp_path, "trace-1", FACTS).close()
    assert not list(tmp_path.iterdir())


def test_trace_that_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    writer = RoutingTrace.to_file(tmp_path / "trace.parquet", FACTS)
    _watch(writer, _routed("a", 0, 3))
    writer.close(is_kept=False)
    assert not list(tmp_path.iterdir())


def test_engine_waits_where_the_disk_is_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "GROUP_ROWS", 4)
    monkeypatch.setattr(trace, "MAX_PENDING_ROWS", 8)
    writer = RoutingTrace.to_file(tmp_path / "trace.parquet", FACTS)
    for step in range(50):
        _watch(writer, _routed("a", step * 4, 4))
        assert writer._num_pending <= 8 + 4
    writer.close()
    assert len(read_trace(tmp_path / "trace.parquet").positions_N) == 200


def test_full_disk_stops_the_trace_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TraceFile, rows: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceFile, "write", refuse)
    monkeypatch.setattr(trace, "GROUP_ROWS", 4)
    monkeypatch.setattr(trace, "MAX_PENDING_ROWS", 8)
    writer = RoutingTrace.to_file(tmp_path / "trace.parquet", FACTS)
    for step in range(20):
        _watch(writer, _routed("a", step * 4, 4))
    with pytest.raises(TraceFailed, match=r"trace\.parquet cannot be written: .*No space left"):
        writer.close()
    assert not list(tmp_path.iterdir())


class _FullDisk(io.FileIO):
    """A file that was made, and takes no byte."""

    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("num_rows", [4, 4000], ids=["at the end", "in between and at the end"])
@pytest.mark.parametrize("has_parts", [False, True], ids=["file", "folder"])
def test_disk_that_takes_nothing_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_parts: bool, num_rows: int
) -> None:
    """What is buffered is refused when it is written and again when the file is closed."""
    monkeypatch.setattr(trace, "GROUP_ROWS", 1000)
    monkeypatch.setattr(trace, "MAX_PENDING_ROWS", 2000)
    monkeypatch.setattr(
        trace_file, "open", lambda path, mode: io.BufferedWriter(_FullDisk(path, mode)), raising=False
    )
    if has_parts:
        writer = RoutingTrace.to_folder(tmp_path, "trace", FACTS)
    else:
        writer = RoutingTrace.to_file(tmp_path / "trace.parquet", FACTS)
    for first in range(0, num_rows, 4):
        _watch(writer, _routed("a", first, 4))
    with pytest.raises(TraceFailed, match=r"trace\S*\.parquet cannot be written: No space left on device$"):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_error_that_nobody_foresaw_does_not_leave_the_engine_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(self: TraceFile, rows: object) -> None:
        raise OverflowError("too large")

    monkeypatch.setattr(TraceFile, "write", stumble)
    monkeypatch.setattr(trace, "GROUP_ROWS", 4)
    monkeypatch.setattr(trace, "MAX_PENDING_ROWS", 8)
    writer = RoutingTrace.to_file(tmp_path / "trace.parquet", FACTS)
    for step in range(20):
        _watch(writer, _routed("a", step * 4, 4))
    with pytest.raises(TraceFailed, match=r"trace\.parquet cannot be written: too large"):
        writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["missing/trace.parquet", "."])
def test_path_that_cannot_be_written_is_told_at_once(tmp_path: Path, path: str) -> None:
    with pytest.raises(TraceFailed, match="cannot be written"):
        RoutingTrace.to_file(tmp_path / path, FACTS)


def _owners(name: str, first: int, count: int) -> tuple[SpanOwner, ...]:
    return (SpanOwner(GenerationRequest(name, (1,)), first, count, list(range(first + count))),)


def _routed(name: str, first: int, count: int) -> RoutedLayer:
    experts_TK = torch.from_numpy(np.stack([np.arange(count) % 8, (np.arange(count) + 1) % 8], axis=1))
    return RoutedLayer(_owners(name, first, count), 1, Routing(experts_TK, torch.full((count, 2), 0.5)))


def _watch(writer: RoutingTrace, routed: RoutedLayer) -> None:
    """What a trace needs of a layer; the rest of a watcher's arguments is left empty."""
    count = routed.num_rows
    gate = GateOutput(routed.layer, torch.zeros(count, 4), torch.zeros(count, 8), 2, True)
    dispatched: Dispatch = None  # type: ignore[assignment]
    writer.watch(routed.owners, gate, routed.routing, dispatched, torch.zeros(0))
