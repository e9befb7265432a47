"""A tiny Qwen3-Omni that speaks, published and ours, and conversations for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from router.batcher import BatchLimits
from router.engine import Engine
from router.loading import LoadedEngine
from router.request import GenerationRequest, SamplingParams
from router.speech.facts import SpeechFacts, read_speech_facts
from router.speech.inputs import check_speech
from router.speech.opening import SpeakerOptions, open_speaker
from router.speech.speaker import Speaker, SpeakerLimits, Spoken
from router.speech.speech import Frame
from router.speech.states import KeptStates, StatesCapture
from router.speech.wish import NUM_CODES, SpeechWish
from tests.engines import prove_once, small_engine
from tests.omni import ASSISTANT, LINE_BREAK, SYSTEM, TURN_END, TURN_START, USER, Part, Published, prompt

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1.05)
REPLY = (*b"Yes, of course.", TURN_END)
Turn = tuple[int, Sequence[Part]]
"""Who, and what."""


def asked(*parts: Part) -> Turn:
    return USER, parts


def answered(text: str) -> Turn:
    return ASSISTANT, (tuple(text.encode()),)


def told(text: str) -> Turn:
    return SYSTEM, (tuple(text.encode()),)


def speech_request(
    loaded: LoadedEngine,
    *turns: Turn,
    name: str = "s",
    voice: str = "ethan",
    reply: tuple[int, ...] = REPLY,
    sampling: SamplingParams = GREEDY,
) -> GenerationRequest:
    assert loaded.media is not None
    parts: list[Part] = []
    for role, said in turns:
        parts += [(TURN_START, role, LINE_BREAK), *said, (TURN_END, LINE_BREAK)]
    parts.append((TURN_START, ASSISTANT, LINE_BREAK))
    ids, placed = prompt(loaded.media.facts, *parts)
    return GenerationRequest(name, ids, sampling, media=placed, speech=SpeechWish(reply, voice))


def speech_facts(loaded: LoadedEngine) -> SpeechFacts:
    facts = read_speech_facts(loaded.store.manifest)
    assert facts is not None
    return facts


def new_speaker(
    loaded: LoadedEngine,
    *,
    num_blocks: int = 32,
    budget_bytes: int | None = None,
    limits: SpeakerLimits | None = None,
) -> Speaker:
    """num_blocks: of keys and values that its speeches can hold."""
    facts = speech_facts(loaded)
    layers, heads, width = 2, 2, 16
    block_bytes = 2 * layers * heads * width * 64 * loaded.dtype.itemsize
    options = SpeakerOptions(budget_bytes, (num_blocks + 1) * block_bytes, limits or SpeakerLimits())
    thinker_VD = loaded.engine.backbone.embeddings_VD
    speaker = open_speaker(loaded.store, facts, thinker_VD, loaded.dtype, options, prove_once)
    assert speaker.allocator.num_blocks == num_blocks + 1
    return speaker


def new_capture(
    loaded: LoadedEngine, request: GenerationRequest, kept: KeptStates | None = None
) -> StatesCapture:
    facts = speech_facts(loaded)
    plan = check_speech(facts, request, loaded.config.vocab_size)
    return StatesCapture(facts, request, plan, kept or KeptStates(lambda: 0))


def compute_states(
    loaded: LoadedEngine, engine: Engine, capture: StatesCapture, request: GenerationRequest
) -> int:
    """Returns how many rows the engine computed."""
    assert loaded.media is not None
    before = engine.stats.prompt_tokens
    if capture.is_needed:
        engine.submit(*capture.request(loaded.media.inputs_for(request)))
    while engine.has_work:
        engine.step()
    return engine.stats.prompt_tokens - before


def states_for(
    loaded: LoadedEngine, request: GenerationRequest, chunk: int | None = None
) -> torch.Tensor | None:
    """From an engine of its own. chunk: most rows of a step."""
    capture = new_capture(loaded, request)
    engine = small_engine(loaded, 24, None if chunk is None else BatchLimits(max_batch_tokens=chunk))
    compute_states(loaded, engine, capture, request)
    return capture.states()


@dataclass
class Speeches:
    """What several requests got."""

    frames: dict[str, list[Frame]]
    ends: dict[str, str]

    def of(self, name: str = "s") -> list[Frame]:
        return self.frames[name]


def speak(
    loaded: LoadedEngine, speaker: Speaker, requests: Sequence[GenerationRequest], join_at: Sequence[int] = ()
) -> Speeches:
    """All of them; request i joins before step join_at[i] (0 where not given)."""
    found = Speeches({request.request_id: [] for request in requests}, {})
    waiting = [(join_at[i] if i < len(join_at) else 0, request) for i, request in enumerate(requests)]
    for step in range(5000):
        for entry in [entry for entry in waiting if entry[0] <= step]:
            speaker.add(entry[1], states_for(loaded, entry[1]))
            waiting.remove(entry)
        if not speaker.has_work and not waiting:
            speaker.allocator.check()
            assert speaker.allocator.num_used == 0, "an ended speech left KV blocks behind"
            return found
        _note(found, speaker.step())
    raise AssertionError("not done")


def _note(found: Speeches, events: Sequence[Spoken]) -> None:
    for event in events:
        if event.frame:
            assert len(event.frame) == NUM_CODES
            found.frames[event.request_id].append(event.frame)
        if event.finish_reason is not None:
            assert event.request_id not in found.ends
            found.ends[event.request_id] = event.error or event.finish_reason


@dataclass(frozen=True)
class PublishedSpeech:
    """`transformers`' whole model."""

    model: Any
    thinker: Published

    @classmethod
    def load(cls, checkpoint: Path) -> PublishedSpeech:
        from transformers import Qwen3OmniMoeForConditionalGeneration

        model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        # Its talker looks for this where a prompt has a sound and an image.
        model.talker.config.audio_config = model.thinker.config.audio_config
        return cls(model, Published(model.thinker))

    def greedy(self, request: GenerationRequest, num_reply: int) -> tuple[tuple[int, ...], list[Frame]]:
        """The reply's tokens that are spoken, and the frames: as many as the request asks for at most.

        It speaks all of a reply but the last token, takes that for the end, and one frame less than it is told.
        """
        assert request.speech is not None
        heard: list[torch.Tensor] = []

        def keep(codes: torch.Tensor, **_: Any) -> torch.Tensor:
            heard.append(codes)
            return torch.zeros(1, 1, 1)

        with mock.patch.object(self.model.code2wav, "chunked_decode", keep):
            tokens, _ = self.model.generate(
                **self.thinker.inputs(request),
                speaker=request.speech.voice,
                return_audio=True,
                thinker_max_new_tokens=num_reply + 1,
                thinker_eos_token_id=None,
                thinker_do_sample=False,
                talker_do_sample=False,
                talker_repetition_penalty=request.sampling.repetition_penalty,
                talker_max_new_tokens=request.sampling.max_tokens + 1,
            )
        reply = tokens[0, len(request.prompt_ids) : -1].tolist()
        return tuple(reply), [tuple(frame) for frame in heard[0][0].T.tolist()]


def resumed(request: GenerationRequest, frames: Sequence[Frame]) -> GenerationRequest:
    """The same request after so many frames."""
    return replace(request, generated_ids=tuple(code for frame in frames for code in frame))
