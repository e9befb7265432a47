"""Hidden states of the text's decoder, which stand for images and sounds in the talker's prompt.

A request for speech whose prompt has media brings one to the engine first, which computes the prompt as far as states
are needed and draws nothing. Called by `router.engine_thread`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from router.prompt_inputs import InputRows, PromptInputs
from router.request import GenerationRequest, SamplingParams
from router.speech.facts import SpeechFacts
from router.speech.prompt import TalkerPrompt


class StatesCapture:
    """Collects one prompt's states as the engine computes them, in whatever pieces and however often."""

    def __init__(self, facts: SpeechFacts, prompt: TalkerPrompt) -> None:
        self._layer, self._indices = facts.accept_layer - 1, prompt.media_indices
        self._places = {index: place for place, index in enumerate(self._indices)}
        self._states_HD: Tensor | None = None

    @property
    def is_needed(self) -> bool:
        return bool(self._indices)

    def request(
        self, speech: GenerationRequest, inputs: PromptInputs
    ) -> tuple[GenerationRequest, PromptInputs]:
        """What the engine is asked for, under the speech's own id. inputs: of the whole prompt, its media encoded."""
        end = self._indices[-1] + 1
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
            capture_from=self._indices[0],
        )
        return asked, wish

    def states(self) -> Tensor:
        """(H, D), one row for each of the prompt's `media_indices`, once the engine has told the request's end."""
        assert self._states_HD is not None, "the engine has computed none of them"
        return self._states_HD

    def _take(self, layer: int, first: int, rows_RD: Tensor) -> None:
        if self._states_HD is None:
            self._states_HD = rows_RD.new_empty(len(self._indices), rows_RD.shape[1])
        wanted = [row for row in range(len(rows_RD)) if first + row in self._places]
        if wanted:
            self._states_HD[[self._places[first + row] for row in wanted]] = rows_RD[wanted]


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
