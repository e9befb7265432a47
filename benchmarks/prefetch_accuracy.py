"""How well the next layer's gate guesses, on a text. Used by `benchmarks.bench_prefetch`; measures no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.one_sequence import OneSequence
from experts.call import ExpertCall
from experts.directory import LocalDirectory
from experts.eviction import DEFAULT_EVICTION, make_worth
from experts.residency import Residency
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions, load_engine


@dataclass(frozen=True)
class Guess:
    """What one layer was expected to ask for, and what it asked for."""

    layer: int
    guessed: tuple[int, ...] | None
    """None where nobody guessed: a first layer."""
    used: tuple[int, ...]


class GuessRecorder(LocalDirectory):
    """Computes as always, and pairs each call with the hint before it."""

    def __init__(self, worker: ExpertWorker) -> None:
        super().__init__(worker)
        self.guesses: list[Guess] = []
        self._hint: tuple[int, tuple[int, ...]] | None = None

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        self._hint = layer, tuple(experts)

    def table(self, component: str, layer: int) -> None:
        """So that every call comes to `run`."""

    def run(self, call: ExpertCall) -> Tensor:
        guessed = self._hint[1] if self._hint is not None and self._hint[0] == call.layer else None
        self.guesses.append(Guess(call.layer, guessed, call.experts))
        self._hint = None
        return super().run(call)


def record_guesses(store_root: Path, texts: Sequence[Path], num_tokens: int, context: int) -> list[Guess]:
    """Token by token, as decoding asks: the first `num_tokens` of the texts in pieces of `context` tokens."""
    loaded = load_engine(ExpertStore.open(store_root), EngineOptions(prefetch=True), GuessRecorder)
    try:
        tokenizer = TextTokenizer.from_folder(store_root)
        ids = [token for text in texts for token in tokenizer.encode(text.read_text(encoding="utf-8"))]
        for piece in torch.split(torch.tensor(ids[:num_tokens]), context):
            sequence = OneSequence(loaded.engine.backbone, len(piece))
            for token_1 in torch.split(piece, 1):
                sequence.step(token_1)
        assert isinstance(loaded.directory, GuessRecorder)
        return loaded.directory.guesses
    finally:
        loaded.close()


def accuracy(guesses: Sequence[Guess], num_experts: int, share: float) -> dict[str, float]:
    """Shares, over the layers that are guessed, with a cache of one stream that holds `share` of all experts.

    of_uses: experts used that were guessed. of_misses: the same for those that the cache lacks, which are all that a
    guess can help with. useful_reads: experts guessed that the cache lacks and that are then used: the rest is read
    for nothing. most_hidden: `of_misses` over the misses of all layers, the first too.
    """
    residency = Residency(int(num_experts * share), make_worth(DEFAULT_EVICTION))
    uses = guessed_uses = misses = guessed_misses = reads = all_misses = 0
    steps: dict[int, int] = {}
    for guess in guesses:
        steps[guess.layer] = steps.get(guess.layer, 0) + 1
        keys = [ExpertKey("", guess.layer, expert) for expert in guess.used]
        missing_guessed = {
            expert for expert in guess.guessed or () if ExpertKey("", guess.layer, expert) not in residency
        }
        load = residency.admit(keys, [1] * len(keys), steps[guess.layer]).load
        all_misses += len(load)
        if guess.guessed is not None:
            uses += len(keys)
            guessed_uses += len(set(guess.guessed) & set(guess.used))
            misses += len(load)
            guessed_misses += sum(key.expert in guess.guessed for key in load)
            reads += len(missing_guessed)
    return {
        "of_uses": guessed_uses / uses,
        "of_misses": guessed_misses / misses,
        "useful_reads": guessed_misses / reads,
        "most_hidden": guessed_misses / all_misses,
    }
