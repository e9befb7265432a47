"""How the answers of a chat are spoken: what a request asks for, checked against what the service gives, and the
request that a router gets for each. Pure but for the ids that it makes up.

Called by `gateway.http.jobs`, `gateway.http.pieces` and the commands.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gateway.errors import ApiError
from gateway.http.openai_types import ChatRequest
from gateway.http.speech_fields import AudioFormat, AudioOptions
from router.errors import PromptInvalid
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.speech.facts import SpeechFacts
from router.speech.prompt import plan_prompt
from router.speech.wish import NUM_CODES, SAMPLE_BYTES, SAMPLE_RATE, SAMPLES_OF_FRAME, SpeechWish

KEPT_S = 3600
"""How long an answer's text is found by the id of its sound."""


@dataclass(frozen=True)
class Delivery:
    """Who speaks, and how the codes are drawn."""

    voice: str
    sampling: SamplingParams
    """Seed and choice are the text's, whatever stands here."""


@dataclass(frozen=True)
class SpokenForm:
    """How all answers of a job are spoken, and sent."""

    delivery: Delivery
    format: AudioFormat
    expires_at: int
    """Unix time in seconds."""

    @property
    def most_bytes(self) -> int:
        """Of one answer's samples."""
        return self.delivery.sampling.max_tokens * SAMPLES_OF_FRAME * SAMPLE_BYTES


def choose_form(request: ChatRequest, facts: SpeechFacts | None, created: int) -> SpokenForm | None:
    """None where the answer is text alone. facts: None where there is no speech. Raises ApiError 400."""
    if not request.is_spoken:
        return None
    if facts is None:
        message = 'Speech is not given here: modalities must be ["text"].'
        raise ApiError(400, message, param="modalities", code="unsupported_parameter")
    asked = request.audio or AudioOptions(voice=None, format=None)
    frames = None if request.sage is None else request.sage.max_speech_frames
    try:
        delivery = choose_delivery(facts, asked.voice, frames)
    except ValueError as error:
        message = f"Invalid value for audio.voice: {error}."
        raise ApiError(400, message, param="audio.voice", code="invalid_value") from error
    form: AudioFormat = asked.format or ("pcm16" if request.stream else "wav")
    return SpokenForm(delivery, form, created + KEPT_S)


def choose_delivery(facts: SpeechFacts, voice: str | None, max_frames: int | None) -> Delivery:
    """As the checkpoint recommends. voice: None means its usual one. max_frames: fewer than it recommends.

    Raises ValueError that names all voices.
    """
    name = facts.default_voice if voice is None else voice.lower()
    if name not in facts.voices:
        raise ValueError(f"must be one of {', '.join(facts.voices)}")
    usual = facts.defaults
    sampling = SamplingParams(
        max_tokens=usual.max_frames if max_frames is None else min(max_frames, usual.max_frames),
        temperature=usual.temperature,
        top_k=usual.top_k,
        top_p=usual.top_p,
        repetition_penalty=usual.repetition_penalty,
    )
    return Delivery(name, sampling)


def check_turn(prompt_ids: Sequence[int], form: SpokenForm, facts: SpeechFacts) -> None:
    """Whether an answer to this prompt could be spoken. Raises ApiError 400."""
    anything = (facts.turns.speech_pad,)
    try:
        plan_prompt(facts, prompt_ids, SpeechWish(anything, form.delivery.voice))
    except PromptInvalid as error:
        message = f"messages cannot be answered in speech: {error.reason}."
        raise ApiError(400, message, param="messages", code="invalid_value") from error


def new_audio_id() -> str:
    """Nobody guesses it."""
    return f"audio_{uuid.uuid4().hex}"


def speech_request(
    request: GenerationRequest, delivery: Delivery, reply_ids: Sequence[int]
) -> GenerationRequest:
    """For the answer that `request` got. Native routing: what a request chooses is of its text."""
    sampling = replace(delivery.sampling, seed=request.sampling.seed, choice=request.sampling.choice)
    return GenerationRequest(
        f"{request.request_id}-speech",
        request.prompt_ids,
        sampling,
        answer_id=request.answer_id or request.request_id,
        media=request.media,
        owner=request.owner,
        speech=SpeechWish(tuple(reply_ids), delivery.voice),
    )


@dataclass(frozen=True)
class SpeechEnd:
    """How much was spoken of an answer."""

    num_frames: int = 0
    num_samples: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    """"length" where it was cut at the most frames."""

    @property
    def seconds(self) -> float:
        return self.num_samples / SAMPLE_RATE

    def after(self, event: TokenEvent) -> SpeechEnd:
        """With what an event of the speech has told; each tells whole frames."""
        return SpeechEnd(
            self.num_frames + len(event.token_ids) // NUM_CODES,
            self.num_samples + len(event.samples) // SAMPLE_BYTES,
            "length" if event.finish_reason == "length" else "stop",
        )


class SpokenReply:
    """Which tokens of an answer are spoken: those whose text is shown."""

    def __init__(self, silent_ids: Iterable[int], encode: Callable[[str], Sequence[int]]) -> None:
        """silent_ids: tokens without text, such as those that end an answer. encode: text to ids."""
        self._silent_ids, self._encode = frozenset(silent_ids), encode
        self._tokens: list[tuple[int, int]] = []
        """Ids, and characters of the text before each."""
        self._pieces: list[str] = []
        self.ids: tuple[int, ...] = ()
        """To be spoken, once the answer has ended; none where nothing is shown."""

    @property
    def text(self) -> str:
        """All that is shown so far."""
        return "".join(self._pieces)

    def note(self, text: str, token_ids: Sequence[int], offsets: Sequence[int]) -> None:
        """What came of an answer, as `AnswerText.take` tells it."""
        self._pieces.append(text)
        told = zip(token_ids, offsets, strict=False)  # tokens behind a stop string have no offset
        self._tokens += [(id_, offset) for id_, offset in told if id_ not in self._silent_ids]

    def end(self, rest: str, num_chars: int) -> None:
        """rest: shown last. num_chars: of the text that all tokens have, whose end a stop string may have cut off.
        A token that it cuts in two is spoken as what is shown of it would be."""
        self._pieces.append(rest)
        end = len(self.text)
        if end >= num_chars:
            self.ids = tuple(id_ for id_, _ in self._tokens) if end else ()
            return
        begins = (*(offset for _, offset in self._tokens), num_chars)
        cut_at = max((offset for offset in begins if offset <= end), default=0)
        whole = tuple(id_ for id_, offset in self._tokens if offset < cut_at)
        self.ids = (*whole, *self._encode(self.text[cut_at:])) if cut_at < end else whole
