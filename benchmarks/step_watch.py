"""Watches an engine's steps from outside: where their time goes, which experts they use, how many bytes they must read.

Wraps every mixture of experts and the way to its experts in clocks, and asks layers that are computed in two calls for
the time of their phases; changes no number. Used by `bench_roofline`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from unittest import mock

from torch import Tensor

from experts.call import ExpertCall
from experts.directory import ExpertDirectory
from router.backbone import ForwardPass
from router.loading import LoadedEngine
from router.moe_block import MoeBlock
from router.native_step import NativeStep
from router.step_batch import Span, StepBatch
from router.step_routing import NATIVE, StepRouting

PHASES = ("attention", "gate and dispatch", "experts", "combine", "head", "sampling", "rest")


@dataclass
class StepRecord:
    """One step."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By phase; `rest` is what no clock covers."""
    experts: dict[int, dict[int, int]] = field(default_factory=dict)
    """Layer -> expert -> its rows."""
    num_rows: int = 0
    num_positions: int = 0
    """Of the cache that attention reads, all sequences together."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class StepClocks:
    """Seconds of the step that runs now."""

    def __init__(self) -> None:
        self.gate = self.experts = self.combine = 0.0
        self.run_ended = 0.0

    def reset(self) -> None:
        self.gate = self.experts = self.combine = 0.0


class TimedDirectory:
    """The same directory with a clock around its computation."""

    def __init__(
        self, inner: ExpertDirectory, clocks: StepClocks, on_call: Callable[[ExpertCall], None]
    ) -> None:
        self._inner, self._clocks, self._on_call = inner, clocks, on_call

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def run(self, call: ExpertCall) -> Tensor:
        started = perf_counter()
        self._clocks.gate += started
        rows_RD = self._inner.run(call)
        self._clocks.run_ended = perf_counter()
        self._clocks.experts += self._clocks.run_ended - started
        self._on_call(call)
        return rows_RD


@dataclass(frozen=True)
class TimedMoeBlock(MoeBlock):
    """The same block; what comes before its experts' computation is the gate's, what comes after it the combining's."""

    clocks: StepClocks = field(default_factory=StepClocks)

    def forward(
        self, hidden_PD: Tensor, num_tokens: int, steering: StepRouting = NATIVE, trace: str = ""
    ) -> Tensor:
        self.clocks.gate -= perf_counter()
        out_TD = super().forward(hidden_PD, num_tokens, steering, trace)
        self.clocks.combine += perf_counter() - self.clocks.run_ended
        return out_TD


class StepWatch:
    """Clocks in an engine, and `step`, which runs one and says what it was."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self.loaded = loaded
        self.clocks = StepClocks()
        self._record = StepRecord()
        backbone = loaded.engine.backbone
        backbone.layers = [
            layer if layer.moe is None else replace(layer, moe=self._timed(layer.moe))
            for layer in backbone.layers
        ]
        backbone.arithmetic.clock = self

    def _timed(self, moe: MoeBlock) -> TimedMoeBlock:
        directory: ExpertDirectory = TimedDirectory(  # type: ignore[assignment]
            moe.directory, self.clocks, self._note_call
        )
        return TimedMoeBlock(**(vars(moe) | {"directory": directory}), clocks=self.clocks)

    def _note_call(self, call: ExpertCall) -> None:
        self._record.experts[call.layer] = dict(zip(call.experts, call.counts, strict=True))

    def attended(self, step: NativeStep) -> None:
        """See `LayerClock`."""

    def mixed(self, layer: int, step: NativeStep) -> None:
        """See `LayerClock`."""
        self._record.experts[layer] = dict(sorted(Counter(step.chosen).items()))
        spent = step.experts_s
        if not spent:
            return  # it was paused: its parts say nothing of phases
        self.clocks.gate += sum(spent[phase] for phase in ("norm", "gate", "route", "sort"))
        self.clocks.experts += spent["gate_up"] + spent["down"]
        self.clocks.combine += spent["combine"]

    def step(self) -> tuple[StepRecord, int]:
        """Run one step. Returns what it was and how many tokens it drew."""
        self._record = record = StepRecord()
        self.clocks.reset()
        stats = self.loaded.engine.stats
        before = dict(stats.phase_seconds)
        drawn = stats.generated_tokens
        begin, spans = self.loaded.engine.backbone.begin, list[Span]()

        def noted(batch: StepBatch) -> ForwardPass:
            spans.extend(batch.spans)
            return begin(batch)

        with mock.patch.object(self.loaded.engine.backbone, "begin", noted):
            started = perf_counter()
            self.loaded.engine.step()
            total = perf_counter() - started
        record.num_rows = sum(span.count for span in spans)
        record.num_positions = sum(span.first + span.count for span in spans)
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in stats.phase_seconds.items()}
        clocks = self.clocks
        record.seconds = {
            "attention": spent["attention"],
            "gate and dispatch": clocks.gate,
            "experts": clocks.experts,
            "combine": clocks.combine,
            "head": spent["head"],
            "sampling": spent["sampling"],
        }
        record.seconds["rest"] = total - sum(record.seconds.values())
        return record, stats.generated_tokens - drawn

    def step_bytes(self, record: StepRecord) -> dict[str, int]:
        """Bytes that the step must read at least once, by phase: weights, and keys and values of the cache."""
        loaded = self.loaded
        backbone, pool = loaded.engine.backbone, loaded.engine.pool
        gates = sum(layer.moe.gate_ED.nbytes for layer in backbone.layers if layer.moe is not None)
        layers = sum(layer.nbytes for layer in backbone.layers)
        position_bytes = pool.nbytes // (pool.keys.shape[1] * pool.keys.shape[3])
        keys = loaded.config.num_experts * len(loaded.config.moe_layers)
        expert_bytes = loaded.worker.resident_bytes // keys
        union = sum(map(len, record.experts.values()))
        return {
            "attention": layers - gates + record.num_positions * position_bytes,
            "gate and dispatch": gates,
            "experts": union * expert_bytes,
            "head": backbone.head_VD.nbytes,
        }
