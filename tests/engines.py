"""Runs engines to the end and keeps every row of logits: what the exactness tests compare."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

from experts.device_proof import prove_experts
from experts.devices import CPU
from experts.directory import ExpertDirectory, LocalDirectory
from experts.native_products import chosen_level
from experts.numerics import RowKernel
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from router import loading
from router.batcher import BatchLimits
from router.engine import Engine
from router.kv_cache import KvPool
from router.loading import EngineOptions, LoadedEngine
from router.media.encoder import MediaEncoder
from router.model_config import ModelConfig
from router.pace import Pace
from router.prompt_inputs import NO_INPUTS
from router.request import GenerationRequest, TokenEvent, TokenLogprob
from router.self_test import prove_row_invariance
from router.sequence import Sequence as EngineSequence
from router.step_batch import Half

MAX_STEPS = 5000
KV_BUDGET_BYTES = 1 << 24


@dataclass
class Outcome:
    """Tokens, logits and ends of every request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)


@functools.cache
def _prove(config: ModelConfig, dtype: torch.dtype, device: torch.device, level: str | None) -> RowKernel:
    return prove_row_invariance(config, dtype, device)


_prove_experts_once = functools.cache(prove_experts)


def prove_once(config: ModelConfig, dtype: torch.dtype, device: torch.device = CPU) -> RowKernel:
    """`prove_row_invariance`, which takes time, once for each configuration."""
    return _prove(config, dtype, device, chosen_level(dtype))


def open_engine(
    root: Path,
    options: EngineOptions,
    connect: Callable[[ExpertWorker], ExpertDirectory] = LocalDirectory,
) -> LoadedEngine:
    """The KV cache is small, and the self-test runs once for each configuration: both take time at every start."""
    options = replace(options, kv_budget_bytes=KV_BUDGET_BYTES)
    with (
        mock.patch.object(loading, "prove_row_invariance", prove_once),
        mock.patch.object(loading, "prove_experts", _prove_experts_once),
    ):
        return loading.load_engine(ExpertStore.open(root), options, connect)


class RecordingEngine(Engine):
    """Keeps what every request got, and the logits from which each token was drawn."""

    outcome: Outcome

    def step(self) -> list[TokenEvent]:
        events = super().step()
        for event in events:
            self.outcome.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.logprobs:
                self.outcome.logprobs.setdefault(event.request_id, []).extend(event.logprobs)
            if event.prompt_logprobs:
                assert event.request_id not in self.outcome.prompt_logprobs, "sent twice"
                self.outcome.prompt_logprobs[event.request_id] = event.prompt_logprobs
            if event.finish_reason is not None:
                self.outcome.reasons[event.request_id] = event.finish_reason
        return events

    def _advance(
        self, sequence: EngineSequence, logits_V: torch.Tensor, best: int, drawn: int | None
    ) -> TokenEvent:
        self.outcome.logits.setdefault(sequence.name, []).append(logits_V.clone())
        return super()._advance(sequence, logits_V, best, drawn)


def small_engine(
    loaded: LoadedEngine, num_blocks: int, limits: BatchLimits | None = None, *, num_swap_blocks: int = 0
) -> RecordingEngine:
    """Another engine over the same backbone, whose steps depend on no clock. num_blocks: KV blocks that its sequences
    can hold."""
    limits = replace(limits or BatchLimits(), is_paced=False)
    pool = KvPool(loaded.config, num_blocks + 1, loaded.dtype, loaded.kernel.device)
    swap_budget_bytes = num_swap_blocks * KvPool.block_bytes(loaded.config, loaded.dtype)
    engine = RecordingEngine(loaded.engine.backbone, pool, limits, swap_budget_bytes=swap_budget_bytes)
    engine.outcome = Outcome()
    engine.grammars = loaded.engine.grammars
    return engine


class SmallestPace(Pace):
    """Prompts have few rows and pause wherever they can, whatever the clock says."""

    longest_s: float = 0.0  # type: ignore[assignment]
    overtaking = 0

    def most_rows(self, most: int, divisible: frozenset[Half] = frozenset()) -> int:
        return 24

    def most_overtaking(self, num_rows: int, layers_left: int, overtaken_s: float = 0.0) -> int:
        return self.overtaking

    def may_go_on(self, half: Half, num_rows: int, left_s: float) -> bool:
        return False


def pause_prompts(engine: Engine, *, within_halves: bool = True, overtaking: int = 0) -> None:
    """Let prompts go beside running streams in the smallest pieces, or pausing between halves of layers only.
    overtaking: rows that may overtake a pass, which somebody who comes finds on its way even without streams."""
    engine.limits = replace(engine.limits, is_paced=True)
    engine.pace = pace = SmallestPace(engine.backbone.config.num_layers)
    pace.overtaking = overtaking
    if overtaking:
        engine.is_called = lambda: True
    if not within_halves:
        engine.pace.longest_s = 1e6


def run_to_end(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    join_at: Sequence[int] = (),
    encoder: MediaEncoder | None = None,
) -> Outcome:
    """Generate all requests; request i joins before step join_at[i] (0 where not given). encoder: of their media."""
    engine.__class__ = RecordingEngine
    assert isinstance(engine, RecordingEngine)
    engine.outcome = outcome = Outcome()
    waiting = [(join_at[i] if i < len(join_at) else 0, request) for i, request in enumerate(requests)]
    for step in range(MAX_STEPS):
        for entry in [entry for entry in waiting if entry[0] <= step]:
            inputs = NO_INPUTS if encoder is None else encoder.inputs_for(entry[1])
            engine.submit(entry[1], inputs)
            waiting.remove(entry)
        if not engine.has_work and not waiting:
            assert_nothing_held(engine)
            return outcome
        engine.step()
    raise AssertionError(f"not done after {MAX_STEPS} steps")


def assert_nothing_held(engine: Engine) -> None:
    engine.allocator.check()
    assert engine.allocator.num_used == 0, "an ended request left KV blocks behind"
    assert engine.swapped_bytes == 0


def assert_same_bits(outcome: Outcome, reference: Outcome) -> None:
    """Tokens equal, and every row of logits and every logprob equal bit for bit."""
    assert outcome.tokens == reference.tokens
    assert outcome.logprobs == reference.logprobs
    assert outcome.prompt_logprobs == reference.prompt_logprobs
    for name, rows in reference.logits.items():
        assert torch.equal(torch.stack(outcome.logits[name]), torch.stack(rows)), f"logits of {name} differ"


class GatedEngine(RecordingEngine):
    """A step waits for its gate and fails when told to; stands for a slow, stuck or broken engine."""

    def __init__(self, engine: Engine) -> None:
        """Computes as `engine` does, with a small KV cache of its own."""
        pool = KvPool(engine.backbone.config, 9, engine.pool.keys.dtype)
        super().__init__(engine.backbone, pool, engine.limits)
        self.outcome = Outcome()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None

    def step(self) -> list[TokenEvent]:
        self.entered.set()
        assert self.gate.wait(30), "the test never opened the gate"
        if self.failure is not None:
            raise self.failure
        return super().step()
