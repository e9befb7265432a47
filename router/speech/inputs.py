"""From a request for speech to the talker's inputs, position by position. Called by `router.speech.speaker`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from router.errors import PromptInvalid
from router.media.facts import ImageFacts
from router.media.items import Image
from router.media.positions import Grid, image_positions
from router.request import GenerationRequest
from router.speech.facts import SpeechFacts
from router.speech.parts import SpeechParts
from router.speech.prompt import TalkerPrompt, plan_prompt
from router.speech.wish import NUM_CODES

TEXT_ROWS = 32
"""Of what is added to frames, made at a time: the weights are read once for them."""


def check_speech(facts: SpeechFacts, request: GenerationRequest, vocab_size: int) -> TalkerPrompt:
    """What a request asks the talker for; any thread may ask. vocab_size: of the text. Raises PromptInvalid."""
    wish = request.speech
    assert wish is not None
    for token_id in (*request.prompt_ids, *wish.reply_ids):
        if not 0 <= token_id < vocab_size:
            raise PromptInvalid(f"token id {token_id} is outside the vocabulary of {vocab_size}")
    codes, most = request.generated_ids, facts.codec.num_codes
    if len(codes) % NUM_CODES or any(not 0 <= code < most for code in codes):
        raise PromptInvalid(f"what it was told are no frames of {NUM_CODES} codes below {most}")
    if len(codes) // NUM_CODES >= request.sampling.max_tokens:
        raise PromptInvalid(f"max_tokens of {request.sampling.max_tokens} frames leaves nothing to speak")
    return plan_prompt(facts, request.prompt_ids, wish)


class TalkerInputs:
    """One speech's inputs, made when they are asked for, so that a long conversation holds nobody up. A row's bits do
    not depend on those that are made beside it."""

    def __init__(
        self,
        parts: SpeechParts,
        prompt: TalkerPrompt,
        prompt_ids: Sequence[int],
        hidden_HD: Tensor | None = None,
    ) -> None:
        """prompt_ids: of the request. hidden_HD: one row for each of the prompt's `media_indices`."""
        self._parts, self._prompt, self._hidden_HD = parts, prompt, hidden_HD
        self._ids = (*(prompt_ids[index] for index in prompt.shown), *prompt.lead_ids)
        self._is_medium = (*prompt.is_medium, *(False for _ in prompt.lead_ids))
        self._media_before = (0, *accumulate(self._is_medium))
        self._texts: dict[int, Tensor] = {}
        """TEXT_ROWS of what is added to frames, by number."""

    @property
    def num_positions(self) -> int:
        """Of the prompt; a frame each follows."""
        return len(self._ids)

    def prompt(self, first: int, count: int) -> Tensor:
        """(R, D) of those of so many positions that are the prompt's."""
        parts, positions = self._parts, range(first, min(first + count, self.num_positions))
        made_RD = torch.empty(len(positions), parts.talker.config.hidden_size, dtype=parts.dtype)
        text = [position for position in positions if not self._is_medium[position]]
        media = [position for position in positions if self._is_medium[position]]
        if text:
            made_RD[[position - first for position in text]] = parts.text([self._ids[p] for p in text])
        if media:
            assert self._hidden_HD is not None
            hidden_RD = self._hidden_HD[[self._media_before[position] for position in media]]
            rows = [position - first for position in media]
            made_RD[rows] = parts.hidden_projection(hidden_RD.to("cpu", parts.dtype))
        for position in positions[max(0, len(self._prompt.shown) - first) :]:
            code = self._prompt.lead_codes[position - len(self._prompt.shown)]
            if code is not None:
                made_RD[position - first] += parts.talker.embeddings_VD[code]
        return made_RD

    def beside(self, frames: range) -> Tensor:
        """(F, D) text that is added to these frames' inputs."""
        return torch.stack([self._text(min(frame, len(self._prompt.trailing_ids))) for frame in frames])

    def _text(self, number: int) -> Tensor:
        """(D,) of one frame; behind the last text there is what stands for none."""
        block, row = divmod(number, TEXT_ROWS)
        if block not in self._texts:
            ids = (*self._prompt.trailing_ids, self._prompt.pad_id)
            self._texts[block] = self._parts.text(ids[block * TEXT_ROWS : (block + 1) * TEXT_ROWS])
        return self._texts[block][row]


def speech_positions(
    request: GenerationRequest, prompt: TalkerPrompt, images: ImageFacts | None
) -> Tensor | None:
    """(3, P) int64; None means 0, 1, 2, ... in all three rows. Images stand as they do in the text's prompt; those of
    turns that are not shown do not. images: how they are cut, where the model sees."""
    places = {index: place for place, index in enumerate(prompt.shown)}
    grids = []
    for placed in request.media:
        if isinstance(placed.medium, Image) and placed.first in places:
            assert images is not None
            grids.append(Grid(places[placed.first], *images.grid(placed.medium)))
    return image_positions(prompt.num_positions, grids) if grids else None


def check_states(prompt: TalkerPrompt, hidden_HD: Tensor | None) -> None:
    """One row for each position of images and sounds. Raises PromptInvalid."""
    found, expected = 0 if hidden_HD is None else len(hidden_HD), len(prompt.media_indices)
    if found != expected:
        raise PromptInvalid(f"{found} hidden states for {expected} positions of images and sounds")
