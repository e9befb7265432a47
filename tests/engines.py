"""Runs engines to the end and keeps every row of logits: what the exactness tests compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experts.directory import ExpertDirectory, LocalDirectory
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from router.engine import Engine
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest, TokenEvent
from router.sequence import Sequence as EngineSequence

MAX_STEPS = 5000


@dataclass
class Outcome:
    """Tokens, logits and ends of every request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def open_engine(
    root: Path,
    options: EngineOptions,
    connect: Callable[[ExpertWorker], ExpertDirectory] = LocalDirectory,
) -> LoadedEngine:
    return load_engine(ExpertStore.open(root), options, connect)


class RecordingEngine(Engine):
    """Keeps the logits from which each token was drawn."""

    outcome: Outcome

    def _advance(self, sequence: EngineSequence, logits_V: torch.Tensor) -> TokenEvent:
        self.outcome.logits.setdefault(sequence.name, []).append(logits_V.clone())
        return super()._advance(sequence, logits_V)


def run_to_end(
    loaded: LoadedEngine, requests: Sequence[GenerationRequest], join_at: Sequence[int] = ()
) -> Outcome:
    """Generate all requests; request i joins before step join_at[i] (0 where not given)."""
    engine = loaded.engine
    engine.__class__ = RecordingEngine
    assert isinstance(engine, RecordingEngine)
    engine.outcome = outcome = Outcome()
    waiting = [(join_at[i] if i < len(join_at) else 0, request) for i, request in enumerate(requests)]
    for step in range(MAX_STEPS):
        for entry in [entry for entry in waiting if entry[0] <= step]:
            engine.submit(entry[1])
            waiting.remove(entry)
        if not engine.has_work and not waiting:
            engine.allocator.check()
            assert engine.allocator.num_used == 0, "an ended request left KV blocks behind"
            return outcome
        for event in engine.step():
            outcome.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                outcome.reasons[event.request_id] = event.finish_reason
    raise AssertionError(f"not done after {MAX_STEPS} steps")


def assert_same_bits(outcome: Outcome, reference: Outcome) -> None:
    """Tokens equal, and every row of logits equal bit for bit."""
    assert outcome.tokens == reference.tokens
    for name, rows in reference.logits.items():
        assert torch.equal(torch.stack(outcome.logits[name]), torch.stack(rows)), f"logits of {name} differ"
