"""Hidden states of the text's decoder, which stand for images and sounds in the talker's prompt.

A request for speech whose prompt has media brings another one to the engine first, which computes the prompt as far as
states are needed and draws nothing. States of prompts that began alike are kept: who goes on with a conversation needs
those of its new turn alone. Called by `router.engine_thread`.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from router.prompt_inputs import InputRows, PromptInputs
from router.request import GenerationRequest, SamplingParams
from router.speech.facts import SpeechFacts
from router.speech.prompt import TalkerPrompt

KEPT_BYTES = 64 << 20
"""Of the published model's states those of twenty minutes of sound, or a dozen of the largest images."""


MOST_OPEN_BYTES = 128 << 20
"""Of open speeches' states, those that wait for their turn included; one always fits."""


class KeptStates:
    """What was captured last, by everything that decides its bits: whose it is, and the prompt up to there. Any thread
    may ask."""

    def __init__(self, num_doubts: Callable[[], int], most_bytes: int = KEPT_BYTES) -> None:
        """num_doubts: how often something was found to have been computed wrongly; what is older is not found again."""
        self.num_doubts, self._most_bytes = num_doubts, most_bytes
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def find(self, name: bytes) -> Tensor | None:
        with self._lock:
            rows_RD = self._rows.get(name)
            if rows_RD is not None:
                self._rows.move_to_end(name)
            return rows_RD

    def keep(self, name: bytes, rows_RD: Tensor) -> None:
        with self._lock:
            self.nbytes += rows_RD.nbytes - (self._rows[name].nbytes if name in self._rows else 0)
            self._rows[name] = rows_RD
            while self.nbytes > self._most_bytes:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes


class StatesCapture:
    """One speech's states: those that were kept, and the others as the engine computes them, in whatever pieces and
    however often."""

    def __init__(
        self, facts: SpeechFacts, speech: GenerationRequest, prompt: TalkerPrompt, kept: KeptStates
    ) -> None:
        self._layer, self._speech, self._kept = facts.accept_layer - 1, speech, kept
        self._runs = _runs(prompt.media_indices)
        num_doubts = kept.num_doubts()
        self._names = [_name(speech, run.stop, num_doubts) for run in self._runs]
        self._found = [kept.find(name) for name in self._names]
        self._missing = [run for run, rows in zip(self._runs, self._found, strict=True) if rows is None]
        self._captured: dict[int, Tensor] = {}
        """By where the missing runs begin."""

    @property
    def is_needed(self) -> bool:
        """Whether the engine has to compute some."""
        return bool(self._missing)

    @property
    def num_states(self) -> int:
        return sum(map(len, self._runs))

    def request(self, inputs: PromptInputs) -> tuple[GenerationRequest, PromptInputs]:
        """What the engine is asked for, under the speech's own id. inputs: of the whole prompt, its media encoded."""
        speech, end = self._speech, self._missing[-1].stop
        asked = GenerationRequest(
            speech.request_id,
            speech.prompt_ids[:end],
            SamplingParams(max_tokens=0),
            media=tuple(placed for placed in speech.media if placed.first < end),
            owner=speech.owner,
        )
        wish = replace(
            _cut(inputs, end),
            capture_layers=(self._layer,),
            on_capture=self._take,
            capture_from=self._missing[0].start,
        )
        return asked, wish

    def states(self) -> Tensor | None:
        """(H, D), one row for each of the prompt's `media_indices`, once the engine has told the request's end; None
        where there are none."""
        parts = [
            self._captured[run.start] if rows is None else rows
            for run, rows in zip(self._runs, self._found, strict=True)
        ]
        return torch.cat(parts) if parts else None

    def keep(self) -> None:
        """Let later speeches find what was captured; not where experts of another numerics class had a part in it."""
        for run, name in zip(self._runs, self._names, strict=True):
            if run.start in self._captured:
                self._kept.keep(name, self._captured[run.start])

    def _take(self, layer: int, first: int, rows_RD: Tensor) -> None:
        for run in self._missing:
            begin, end = max(run.start, first), min(run.stop, first + len(rows_RD))
            if begin < end:
                if run.start not in self._captured:
                    # The talker is on the CPU, wherever the text's decoder is.
                    self._captured[run.start] = rows_RD.new_empty(len(run), rows_RD.shape[1], device="cpu")
                part_RD = rows_RD[begin - first : end - first]
                self._captured[run.start][begin - run.start : end - run.start] = part_RD


def _runs(indices: tuple[int, ...]) -> list[range]:
    """Ascending indices as runs without gaps."""
    if not indices:
        return []
    gaps = [place + 1 for place, (one, next_one) in enumerate(pairwise(indices)) if next_one != one + 1]
    bounds = pairwise((0, *gaps, len(indices)))
    return [range(indices[begin], indices[end - 1] + 1) for begin, end in bounds]


def _name(speech: GenerationRequest, end: int, num_doubts: int) -> bytes:
    """A state follows from the tokens up to it and from what those of media stand for."""
    seen = [placed for placed in speech.media if placed.first < end]
    said = repr((num_doubts, speech.owner, end, [(placed.first, placed.medium.digest) for placed in seen]))
    return hashlib.sha256(said.encode() + array("q", speech.prompt_ids[:end]).tobytes()).digest()


def _cut(inputs: PromptInputs, end: int) -> PromptInputs:
    """Of a prompt's first tokens; media that begin among them end there too."""

    def before(runs: tuple[InputRows, ...]) -> tuple[InputRows, ...]:
        return tuple(run for run in runs if run.first < end)

    return replace(
        inputs,
        embeddings=before(inputs.embeddings),
        positions_3P=None if inputs.positions_3P is None else inputs.positions_3P[:, :end],
        injections={layer: runs for layer, added in inputs.injections.items() if (runs := before(added))},
        media=None if inputs.media is None else tuple(span for span in inputs.media if span.first < end),
    )
