"""What the talker is shown before it speaks, and while it does: which tokens, media and codes, position by position.

Pure. Of the conversation it gets the user's turns and the turn that it speaks; instructions and earlier answers it does
not. Each position has a text side, an embedding of the text decoder or what that makes of an image or a sound, and
mostly from the assistant's turn on a side of codes. Called by `router.speech.speaker`.
Source: `transformers`, Qwen3OmniMoeForConditionalGeneration.generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.errors import PromptInvalid
from router.speech.facts import SpeechFacts, TurnIds
from router.speech.wish import SpeechWish

NUM_ROLE_TOKENS = 3
"""Start of the turn, the role, a line break."""
NUM_PADS = 4
"""Between these and where the text begins, beside the codes that announce a speech."""


@dataclass(frozen=True)
class TalkerPrompt:
    """Plain numbers, from which `router.speech.speaker` makes the talker's inputs."""

    shown: tuple[int, ...]
    """Indices of the request's prompt that the user's turns have, in order."""
    is_medium: tuple[bool, ...]
    """Of each of `shown`, whether it stands for a part of an image or a sound."""
    lead_ids: tuple[int, ...]
    """Text tokens of the assistant's turn before it speaks."""
    lead_codes: tuple[int | None, ...]
    """Ids of the talker that are added to the last of them."""
    trailing_ids: tuple[int, ...]
    """Text tokens that are added to the frames, one each; behind them `pad_id` is."""
    pad_id: int

    @property
    def num_positions(self) -> int:
        return len(self.shown) + len(self.lead_ids)

    @property
    def media_indices(self) -> tuple[int, ...]:
        """Of the request's prompt: whose hidden states are needed."""
        return tuple(index for index, is_medium in zip(self.shown, self.is_medium, strict=True) if is_medium)


def plan_prompt(facts: SpeechFacts, prompt_ids: Sequence[int], wish: SpeechWish) -> TalkerPrompt:
    """Raises PromptInvalid for a voice that there is not, a prompt that ends with no assistant's turn, or a reply in
    which there is nothing to speak."""
    ids, codec = facts.turns, facts.codec
    voice = facts.voices.get(wish.voice)
    if voice is None:
        raise PromptInvalid(f"there is no voice {wish.voice[:64]!r}, only {', '.join(facts.voices)}")
    answer = _answer_start(ids, prompt_ids)
    spoken = wish.reply_ids[:-1] if wish.reply_ids[-1:] and wish.reply_ids[-1] in ids.ends else wish.reply_ids
    turn = (*prompt_ids[answer:], *spoken)
    role, text = turn[:NUM_ROLE_TOKENS], turn[NUM_ROLE_TOKENS:]
    if not text or not spoken:
        raise PromptInvalid("its reply has nothing to speak")
    shown = tuple(_user_indices(ids, prompt_ids))
    announced = codec.no_thought, codec.thought_begin, codec.thought_end, voice, codec.pad, codec.begin
    return TalkerPrompt(
        shown,
        tuple(prompt_ids[index] in ids.media for index in shown),
        (*role, *(ids.speech_pad,) * NUM_PADS, ids.speech_start, text[0]),
        (*(None,) * NUM_ROLE_TOKENS, *announced),
        (*text[1:], ids.speech_end),
        ids.speech_pad,
    )


def _answer_start(ids: TurnIds, prompt_ids: Sequence[int]) -> int:
    """Where the assistant's last turn begins."""
    for index in range(len(prompt_ids) - 2, -1, -1):
        if prompt_ids[index] == ids.turn_start and prompt_ids[index + 1] == ids.assistant:
            return index
    raise PromptInvalid("it has no turn of the assistant to speak")


def _user_indices(ids: TurnIds, prompt_ids: Sequence[int]) -> list[int]:
    """A turn goes from its start to the next one's; what stands before the first has the role of nobody."""
    indices: list[int] = []
    is_user = False
    for index, token_id in enumerate(prompt_ids):
        if token_id == ids.turn_start:
            is_user = index + 1 < len(prompt_ids) and prompt_ids[index + 1] == ids.user
        if is_user:
            indices.append(index)
    return indices
