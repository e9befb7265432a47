"""From a request for speech to the talker's inputs, position by position. Called by `router.speech.speaker`."""

from __future__ import annotations

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
from router.speech.speech import Speech
from router.speech.wish import NUM_CODES


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


class PromptMaker:
    """Knows what the talker's inputs are made of."""

    def __init__(self, facts: SpeechFacts, parts: SpeechParts, images: ImageFacts | None = None) -> None:
        self._facts, self._parts, self._images = facts, parts, images

    @torch.inference_mode()
    def speech(self, request: GenerationRequest, hidden_HD: Tensor | None) -> Speech:
        """hidden_HD: one row for each of the prompt's `media_indices`. Raises PromptInvalid."""
        prompt = check_speech(self._facts, request, self._parts.thinker_VD.shape[0])
        shown_SD = self._shown(request, prompt, hidden_HD)
        trailing_ND = self._parts.text((*prompt.trailing_ids, prompt.pad_id))
        inputs_PD = torch.cat((shown_SD, self._lead(prompt)))
        return Speech(request, inputs_PD, trailing_ND, self._positions(request, prompt))

    def _shown(self, request: GenerationRequest, prompt: TalkerPrompt, hidden_HD: Tensor | None) -> Tensor:
        """Of the user's turns."""
        parts, num_media = self._parts, len(prompt.media_indices)
        found = 0 if hidden_HD is None else len(hidden_HD)
        if found != num_media:
            raise PromptInvalid(f"{found} hidden states for {num_media} positions of images and sounds")
        shown_SD = torch.empty(len(prompt.shown), parts.talker.config.hidden_size, dtype=parts.dtype)
        is_medium = torch.tensor(prompt.is_medium, dtype=torch.bool)
        ids = [request.prompt_ids[i] for i, m in zip(prompt.shown, prompt.is_medium, strict=True) if not m]
        if ids:
            shown_SD[~is_medium] = parts.text(ids)
        if hidden_HD is not None and num_media:
            shown_SD[is_medium] = parts.hidden_projection(hidden_HD.to("cpu", parts.dtype))
        return shown_SD

    def _lead(self, prompt: TalkerPrompt) -> Tensor:
        """Of the assistant's turn before it speaks: text and codes."""
        lead_LD = self._parts.text(prompt.lead_ids)
        for position, code in enumerate(prompt.lead_codes):
            if code is not None:
                lead_LD[position] += self._parts.talker.embeddings_VD[code]
        return lead_LD

    def _positions(self, request: GenerationRequest, prompt: TalkerPrompt) -> Tensor | None:
        """Images stand as they do in the text's prompt; those of turns that are not shown do not."""
        places = {index: place for place, index in enumerate(prompt.shown)}
        grids = []
        for placed in request.media:
            if isinstance(placed.medium, Image) and placed.first in places:
                assert self._images is not None
                grids.append(Grid(places[placed.first], *self._images.grid(placed.medium)))
        return image_positions(prompt.num_positions, grids) if grids else None
