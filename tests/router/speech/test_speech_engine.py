"""From requests to codes and samples: pieces, several speeches, failures, and what was told before.

The reference of samples is the codec's decoder over all frames at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from router.errors import SpeechFailed
from router.loading import LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.speech.speaker import SpeakerLimits
from router.speech.speech import Frame, frames_of
from router.speech.speech_engine import SpeechEngine
from router.speech.utterance import Utterance
from router.speech.vocoder import FRAMES_AT_ONCE, Vocoder, VoiceStream
from router.speech.wish import NUM_CODES, SAMPLES_OF_FRAME
from tests.speech import asked, new_speaker, resumed, speech_request

DRAWN = SamplingParams(max_tokens=30, temperature=0.9, top_k=50, repetition_penalty=1.05)


@dataclass
class Heard:
    """What one request got."""

    frames: list[Frame] = field(default_factory=list)
    samples: bytes = b""
    pieces: list[int] = field(default_factory=list)
    end: str | None = None


def hear(engine: SpeechEngine, most_steps: int = 500) -> dict[str, Heard]:
    """Steps to the end of all speeches."""
    heard: dict[str, Heard] = {}
    for _ in range(most_steps):
        for event in engine.step():
            note(heard.setdefault(event.request_id, Heard()), event)
        if not engine.has_work:
            return heard
    raise AssertionError("not done")


def note(heard: Heard, event: TokenEvent) -> None:
    assert heard.end is None
    frames = frames_of(event.token_ids)
    heard.frames += frames
    heard.samples += event.samples
    heard.pieces.append(len(frames))
    assert event.is_first == (bool(frames) and len(heard.frames) == len(frames))
    if event.finish_reason is not None:
        heard.end = event.error or event.finish_reason


def ends(events: Sequence[TokenEvent]) -> list[str]:
    return [event.request_id for event in events if event.finish_reason is not None]


def speech(omni: LoadedEngine, name: str, seed: int, num_frames: int = 30) -> GenerationRequest:
    sampling = replace(DRAWN, seed=seed, max_tokens=num_frames)
    return speech_request(omni, asked(b"How are you?"), name=name, sampling=sampling)


@pytest.fixture(scope="module")
def vocoder(omni: LoadedEngine) -> Vocoder:
    return Vocoder.open(omni.store, omni.kernel, omni.dtype)


@pytest.fixture
def engine(omni: LoadedEngine, vocoder: Vocoder) -> Iterator[SpeechEngine]:
    engine = SpeechEngine(new_speaker(omni), vocoder)
    yield engine
    engine.close()


def test_samples_are_those_of_the_frames(omni: LoadedEngine, engine: SpeechEngine, vocoder: Vocoder) -> None:
    engine.add(speech(omni, "s", 1), None)
    heard = hear(engine)["s"]
    assert len(heard.frames) == 30 and heard.end == "length"
    assert heard.samples == vocoder.speak(vocoder.stream(), heard.frames)
    assert heard.pieces == [1, 2, 4, 8, 8, 7]


def test_several_speeches_are_each_what_they_are_alone(omni: LoadedEngine, engine: SpeechEngine) -> None:
    requests = [speech(omni, f"s{seed}", seed, 9 + 4 * seed) for seed in range(4)]
    alone = {}
    for request in requests:
        engine.add(request, None)
        alone |= hear(engine)
    for request in requests:
        engine.add(request, None)
    beside = hear(engine)
    for name, heard in alone.items():
        assert (beside[name].frames, beside[name].samples) == (heard.frames, heard.samples)
    assert len({heard.samples[:3000] for heard in alone.values()}) == 4


@pytest.mark.parametrize("num_told", [1, 7, 8, 21, 29])
def test_resumed_speech_tells_the_rest_and_nothing_again(
    omni: LoadedEngine, engine: SpeechEngine, num_told: int
) -> None:
    request = speech(omni, "s", 3)
    engine.add(request, None)
    whole = hear(engine)["s"]
    told = whole.frames[:num_told]
    engine.add(resumed(request, told), None)
    rest = hear(engine)["s"]
    assert rest.frames == whole.frames[num_told:]
    first = engine.vocoder.shape.num_samples(num_told)
    assert rest.samples == whole.samples[2 * first :]


def test_resumed_speech_makes_no_more_sound_again_than_the_rest_depends_on(
    omni: LoadedEngine, engine: SpeechEngine
) -> None:
    lookback = engine.vocoder.shape.lookback
    request = speech(omni, "s", 3, 2 * lookback)
    engine.add(request, None)
    whole = hear(engine)["s"]
    begun = engine.stats.samples
    engine.add(resumed(request, whole.frames[:-4]), None)
    rest = hear(engine)["s"]
    assert rest.samples == whole.samples[-2 * 4 * SAMPLES_OF_FRAME :]
    assert engine.stats.samples - begun == engine.vocoder.shape.num_samples(lookback + 4)


def test_who_comes_later_is_heard_before_the_others_are_done(
    omni: LoadedEngine, engine: SpeechEngine
) -> None:
    engine.add(speech(omni, "early", 1, 60), None)
    for _ in range(20):
        engine.step()
    engine.add(speech(omni, "late", 2, 5), None)
    names = [event.request_id for _ in range(3) for event in engine.step()]
    assert "late" in names
    ended = [name for _ in range(80) for name in ends(engine.step())]
    assert ended == ["late", "early"]


@pytest.mark.parametrize("num_told", [0, 9])
def test_only_speeches_that_get_frames_have_streams(
    omni: LoadedEngine, vocoder: Vocoder, num_told: int
) -> None:
    """Of which the account of memory has no more."""
    engine = SpeechEngine(new_speaker(omni, limits=SpeakerLimits(most_running=3)), vocoder)
    for seed in range(20):
        engine.add(resumed(speech(omni, f"s{seed}", seed, 20), [(0,) * NUM_CODES] * num_told), None)
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, sum(each.stream is not None for each in engine._utterances.values()))
    assert most == 3
    engine.close()


def test_what_was_told_goes_first_and_new_frames_in_growing_pieces() -> None:
    utterance = Utterance("s", [(0,) * NUM_CODES] * 99, lookback=11)
    assert utterance.first == 88
    assert utterance.take() == (((0,) * NUM_CODES,) * FRAMES_AT_ONCE, True)
    assert len(utterance.take().frames) == 3
    assert not utterance.is_ready and utterance.is_urgent
    for _ in range(2):
        utterance.add((1,) * NUM_CODES)
    assert utterance.is_ready and len(utterance.take().frames) == 2
    assert not utterance.is_ready and not utterance.is_urgent
    utterance.finish_reason = "stop"
    assert utterance.is_ready and utterance.is_done and not utterance.take().frames


class MuteVocoder(Vocoder):
    """Fails at one piece."""

    def __init__(self, vocoder: Vocoder, at: int) -> None:
        self.__dict__.update(vocoder.__dict__)
        self.left = at

    def speak(self, stream: VoiceStream, frames: Sequence[Sequence[int]]) -> bytes:
        self.left -= 1
        if not self.left:
            raise SpeechFailed("a sample is no number")
        return super().speak(stream, frames)


def test_speech_whose_sound_fails_ends_and_no_other_does(omni: LoadedEngine, vocoder: Vocoder) -> None:
    engine = SpeechEngine(new_speaker(omni), MuteVocoder(vocoder, 3))
    engine.add(speech(omni, "a", 1), None)
    engine.add(speech(omni, "b", 2), None)
    found = {name: heard.end for name, heard in hear(engine).items()}
    failed, other = sorted(map(str, found.values()), key="the reply could not be spoken".__ne__)
    assert failed == "the reply could not be spoken" and other in ("length", "stop")
    assert engine.stats.failed == 1 and not engine.speaker.has_work
    engine.close()


def test_removed_speech_leaves_nothing(omni: LoadedEngine, engine: SpeechEngine) -> None:
    engine.add(speech(omni, "s", 1), None)
    for _ in range(5):
        engine.step()
    assert engine.remove("s") and not engine.remove("s")
    assert not engine.has_work and not engine.speaker.has_work and not engine.step()
    assert engine.speaker.allocator.num_used == 0
