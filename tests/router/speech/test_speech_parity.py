"""Frames of codes against `transformers`: greedy, equal, for every kind of conversation and every voice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from router.loading import LoadedEngine
from router.speech.wish import SpeechWish
from tests.checkpoints import VOICES
from tests.omni import TURN_END, image, sound
from tests.speech import (
    GREEDY,
    PublishedSpeech,
    Turn,
    answered,
    asked,
    new_speaker,
    speak,
    speech_facts,
    speech_request,
    told,
)

pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
HELLO = tuple(b"Hello there, how are you?")
NUM_REPLY = 11
CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "text": (asked(HELLO),),
    "several turns": (told("Be short."), asked(HELLO), answered("Fine."), asked(tuple(b"And you?"))),
    "image": (asked(image(48, 64), HELLO),),
    "image in an earlier turn": (asked(HELLO, image(24, 40, 1)), answered("Seen."), asked(HELLO)),
    "two images": (asked(image(24, 40, 1), HELLO), answered("One."), asked(HELLO, image(32, 32, 2))),
    "sound": (
        told("Listen."),
        asked(sound(1.7)),
    ),
    "sounds in several turns": (asked(sound(0.9, 1)), answered("Heard."), asked(HELLO, sound(1.3, 2))),
    "image and sound": (asked(image(24, 48), HELLO, sound(1.1)), answered("Both."), asked(image(16, 16, 3))),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_frames_equal_those_of_transformers(
    omni: LoadedEngine, published_speech: PublishedSpeech, name: str
) -> None:
    _assert_parity(omni, published_speech, CONVERSATIONS[name], "ethan", NUM_REPLY)


@pytest.mark.parametrize("voice", VOICES)
def test_each_voice_speaks_as_in_transformers(
    omni: LoadedEngine, published_speech: PublishedSpeech, voice: str
) -> None:
    _assert_parity(omni, published_speech, CONVERSATIONS["text"], voice, NUM_REPLY)


@pytest.mark.parametrize("num_reply", [1, 2, 40])
def test_reply_shorter_or_longer_than_its_speech_is_spoken_alike(
    omni: LoadedEngine, published_speech: PublishedSpeech, num_reply: int
) -> None:
    _assert_parity(omni, published_speech, CONVERSATIONS["text"], "aiden", num_reply)


def test_speech_that_ends_itself_ends_as_in_transformers(
    omni: LoadedEngine, published_speech: PublishedSpeech
) -> None:
    """With an id for the end that is likelier than a code which these weights would draw."""
    end = speech_facts(omni).codec.end
    request = speech_request(omni, *CONVERSATIONS["text"])
    speaker = new_speaker(omni)
    ours, theirs = speaker.parts.talker.head_VD, published_speech.model.talker.codec_head.weight.data
    assert isinstance(ours, torch.Tensor)
    before = theirs[end].clone()
    _, endless = published_speech.greedy(request, NUM_REPLY)
    code = endless[9][0]
    ours[end], theirs[end] = 1.5 * ours[code], 1.5 * theirs[code]
    reply, frames = published_speech.greedy(request, NUM_REPLY)
    theirs[end] = before
    found = speak(omni, speaker, [replace(request, speech=SpeechWish((*reply, TURN_END), "ethan"))])
    assert 0 < len(frames) <= 9
    assert found.of() == frames
    assert found.ends == {"s": "stop"}


def _assert_parity(
    omni: LoadedEngine, published: PublishedSpeech, turns: tuple[Turn, ...], voice: str, num_reply: int
) -> None:
    request = speech_request(omni, *turns, voice=voice)
    reply, frames = published.greedy(request, num_reply)
    assert len(reply) == num_reply
    ours = speak(omni, new_speaker(omni), [replace(request, speech=SpeechWish((*reply, TURN_END), voice))])
    assert ours.of() == frames
    assert ours.ends == {"s": "length" if len(frames) == GREEDY.max_tokens else "stop"}
