"""Requests for speech beside those for text: spoken on their own thread, cancelled, failed, and what health says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from experts.errors import StoreDamaged
from router import engine_thread
from router.engine_thread import EngineThread
from router.errors import PromptInvalid, QueueFull
from router.loading import LoadedEngine
from router.request import GenerationRequest, TokenEvent
from router.speech import speech_desk
from router.speech.speech import Frame, frames_of
from router.speech.speech_desk import SpeechDesk
from router.speech.speech_engine import SpeechEngine
from router.speech.speech_source import SpeechSource
from router.speech.speech_thread import SpeechThread
from router.speech.vocoder import Vocoder
from router.speech.wish import SpeechWish
from tests.engines import run_to_end, small_engine
from tests.omni import image, request, sound
from tests.router.test_engine_thread import LateClock, Sink
from tests.speech import (
    GREEDY,
    REPLY,
    Turn,
    answered,
    asked,
    new_speaker,
    resumed,
    speak,
    speech_request,
    told,
)

TEXT = (*b"What is this?",)
CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "text": (told("Be short."), asked(TEXT)),
    "image": (asked(TEXT, image(24, 40)),),
    "sound": (asked(sound(1.2), TEXT),),
    "earlier": (asked(image(16, 16)), answered("A cat."), asked(TEXT)),
}


class GatedEngine(SpeechEngine):
    """Waits for its gate at each step, and fails when told to."""

    gate: threading.Event
    failure: Exception | None = None

    def step(self) -> list[TokenEvent]:
        assert self.gate.wait(30), "the test never opened the gate"
        if self.failure is not None:
            raise self.failure
        return super().step()


@dataclass(frozen=True)
class GatedSource(SpeechSource):
    """Opens small engines over one vocoder."""

    loaded: LoadedEngine
    vocoder: Vocoder
    gate: threading.Event
    failures: list[Exception]
    opened: list[GatedEngine]

    def open(self) -> SpeechEngine:
        if self.failures:
            raise self.failures.pop()
        engine = GatedEngine(new_speaker(self.loaded), self.vocoder)
        engine.gate = self.gate
        self.opened.append(engine)
        return engine


@pytest.fixture(scope="module")
def vocoder(omni: LoadedEngine) -> Vocoder:
    return Vocoder.open(omni.store, omni.kernel, omni.dtype)


@pytest.fixture
def source(omni: LoadedEngine, vocoder: Vocoder) -> GatedSource:
    assert omni.speech is not None
    gate = threading.Event()
    gate.set()
    return GatedSource(**vars(omni.speech), loaded=omni, vocoder=vocoder, gate=gate, failures=[], opened=[])


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def thread(omni: LoadedEngine, source: GatedSource, sink: Sink) -> Iterator[EngineThread]:
    thread = EngineThread(small_engine(omni, 24), sink, omni.media, source)
    thread.start()
    yield thread
    source.gate.set()
    thread.stop()


def expected(omni: LoadedEngine, vocoder: Vocoder, request: GenerationRequest) -> tuple[list[Frame], bytes]:
    speaker = new_speaker(omni)
    frames = speak(omni, speaker, [request]).of(request.request_id)
    speaker.close()
    return frames, vocoder.speak(vocoder.stream(), frames)


def got(sink: Sink, name: str) -> tuple[list[Frame], bytes]:
    return frames_of(tuple(sink.tokens[name])), sink.samples[name]


def end(sink: Sink, name: str) -> str | None:
    return sink.ends[name].error or sink.ends[name].finish_reason


def speech(omni: LoadedEngine, name: str = "text", num_frames: int = 30) -> GenerationRequest:
    sampling = replace(GREEDY, max_tokens=num_frames)
    return speech_request(omni, *CONVERSATIONS[name], name=name, sampling=sampling)


def test_speeches_are_what_they_are_without_threads_and_so_is_text_beside_them(
    omni: LoadedEngine, vocoder: Vocoder, thread: EngineThread, sink: Sink
) -> None:
    requests = [speech(omni, name) for name in CONVERSATIONS]
    text = request(omni, image(16, 24), TEXT, name="answer", max_tokens=40)
    for one in (*requests, text):
        thread.submit(one)
    sink.wait_for_ends(*CONVERSATIONS, "answer")
    for one in requests:
        frames, samples = expected(omni, vocoder, one)
        assert got(sink, one.request_id) == (frames, samples)
        assert end(sink, one.request_id) == ("length" if len(frames) == 30 else "stop")
        assert len(frames) > 2
    plain = run_to_end(small_engine(omni, 24), [text], encoder=omni.media)
    assert sink.tokens["answer"] == plain.tokens["answer"] and end(sink, "answer") == "length"
    assert thread.num_open == 0


def test_next_turn_s_speech_asks_the_engine_for_nothing_that_it_knows(
    omni: LoadedEngine, vocoder: Vocoder, thread: EngineThread, sink: Sink
) -> None:
    first = speech(omni, "image")
    turns = (*CONVERSATIONS["image"], answered("A cat."), asked(TEXT))
    second = speech_request(omni, *turns, name="next", sampling=replace(GREEDY, max_tokens=9))
    thread.submit(first)
    sink.wait_for_ends("image")
    num_computed = thread.engine.stats.prompt_tokens
    thread.submit(second)
    sink.wait_for_ends("next")
    assert got(sink, "next") == expected(omni, vocoder, second)
    assert 0 < num_computed == thread.engine.stats.prompt_tokens


def test_resumed_speech_with_an_image_goes_on(
    omni: LoadedEngine, vocoder: Vocoder, thread: EngineThread, sink: Sink
) -> None:
    whole = speech(omni, "image")
    frames, samples = expected(omni, vocoder, whole)
    thread.submit(resumed(whole, frames[:11]))
    sink.wait_for_ends("image")
    first = 2 * vocoder.shape.num_samples(11)
    assert got(sink, "image") == (frames[11:], samples[first:])


def test_what_speaks_is_read_when_it_is_asked_for(
    omni: LoadedEngine, thread: EngineThread, source: GatedSource, sink: Sink
) -> None:
    thread.submit(request(omni, TEXT, name="a"))
    sink.wait_for_ends("a")
    status = thread.speech
    assert status is not None and not source.opened and not status.is_loaded
    thread.submit(speech(omni))
    sink.wait_for_ends("text")
    status = thread.speech
    assert status.is_loaded and status.frames == len(got(sink, "text")[0]) and status.resident_bytes > 100_000
    assert status.samples == len(got(sink, "text")[1]) // 2 and set(status.seconds) >= {"talker", "sound"}
    assert len(source.opened) == 1


@pytest.mark.parametrize("name", ["text", "image"])
def test_cancelled_speech_ends_once(
    omni: LoadedEngine, thread: EngineThread, source: GatedSource, sink: Sink, name: str
) -> None:
    source.gate.clear()
    thread.submit(speech(omni, name))
    thread.cancel(name)
    source.gate.set()
    sink.wait_for_ends(name)
    thread.submit(speech(omni, "sound"))
    sink.wait_for_ends("sound")
    assert end(sink, name) == "cancelled"
    assert not source.opened[0].has_work


def test_speech_is_cancelled_in_the_middle(
    omni: LoadedEngine, thread: EngineThread, source: GatedSource, sink: Sink
) -> None:
    thread.submit(speech(omni, "text", 2000))
    sink.wait(lambda sink: bool(sink.samples.get("text")))
    thread.cancel("text")
    sink.wait_for_ends("text")
    assert end(sink, "text") == "cancelled" and thread.num_open == 0


def test_weights_that_cannot_be_read_end_one_request(
    omni: LoadedEngine, thread: EngineThread, source: GatedSource, sink: Sink
) -> None:
    source.failures.append(StoreDamaged("/a/secret/place", "is gone"))
    thread.submit(speech(omni))
    sink.wait_for_ends("text")
    assert end(sink, "text") == "the reply could not be spoken"
    thread.submit(replace(speech(omni), request_id="again"))
    sink.wait_for_ends("again")
    assert end(sink, "again") != "the reply could not be spoken"


def test_failed_step_ends_speeches_for_another_router_and_no_text(
    omni: LoadedEngine, thread: EngineThread, source: GatedSource, sink: Sink
) -> None:
    source.gate.clear()
    thread.submit(speech(omni))
    wait_until(lambda: bool(source.opened))
    source.opened[0].failure = RuntimeError("broken")
    source.gate.set()
    sink.wait_for_ends("text")
    failed = sink.ends["text"]
    assert failed.is_resumable and failed.error == "the reply could not be spoken"
    thread.submit(request(omni, TEXT, name="a"))
    thread.submit(speech(omni, "sound"))
    sink.wait_for_ends("a", "sound")
    assert end(sink, "sound") in ("stop", "length") and len(source.opened) == 2


def test_waiting_speech_is_no_work_of_the_engine_and_is_seen_to_stall(
    omni: LoadedEngine, thread: EngineThread, source: GatedSource, sink: Sink
) -> None:
    source.gate.clear()
    thread.submit(speech(omni, "image"))
    wait_until(lambda: thread.health().speech_stalled_s > 0.05)
    health = thread.health()
    assert health.is_alive and not health.has_work and thread.num_open == 1
    source.gate.set()
    sink.wait_for_ends("image")
    assert thread.health().speech_stalled_s == 0.0


def test_text_that_comes_long_after_a_speech_began_does_not_look_stuck(
    omni: LoadedEngine,
    thread: EngineThread,
    source: GatedSource,
    sink: Sink,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source.gate.clear()
    thread.submit(speech(omni))
    wait_until(lambda: bool(source.opened))
    monkeypatch.setattr(thread.engine, "step", list)
    clock = LateClock()
    clock.ahead_s = 3600.0
    monkeypatch.setattr(engine_thread, "time", clock)
    thread.submit(request(omni, TEXT, name="a"))
    health = thread.health()
    assert health.has_work and health.seconds_since_step < 30.0


@pytest.mark.parametrize(
    "change",
    [
        {"speech": SpeechWish(REPLY, "nobody")},
        {"speech": SpeechWish((), "ethan")},
        {"generated_ids": (1,) * 15},
        {"generated_ids": (1,) * 480},
        {"prompt_ids": (1, 2, 3)},
    ],
)
def test_speech_that_cannot_be_is_refused_at_once(
    omni: LoadedEngine, thread: EngineThread, change: dict[str, object]
) -> None:
    with pytest.raises(PromptInvalid):
        thread.submit(replace(speech(omni), **change))  # type: ignore[arg-type]
    assert thread.num_open == 0


def test_router_without_speech_refuses_it(omni: LoadedEngine, sink: Sink) -> None:
    thread = EngineThread(small_engine(omni, 8), sink)
    thread.start()
    with pytest.raises(PromptInvalid, match="does not speak"):
        thread.submit(speech(omni))
    assert thread.speech is None
    thread.stop()


def test_engine_keeps_its_own_threads(omni: LoadedEngine, thread: EngineThread, sink: Sink) -> None:
    before = torch.get_num_threads()
    thread.submit(speech(omni))
    sink.wait_for_ends("text")
    assert torch.get_num_threads() == before


def test_stopped_thread_lets_go_of_what_speaks(omni: LoadedEngine, source: GatedSource, sink: Sink) -> None:
    thread = EngineThread(small_engine(omni, 8), sink, omni.media, source)
    thread.start()
    thread.submit(speech(omni, "text", 2000))
    sink.wait(lambda sink: bool(sink.samples.get("text")))
    thread.stop()
    assert thread.speech is not None and not thread.speech.is_loaded


def test_stopped_thread_reads_nothing_for_speeches_that_wait(
    omni: LoadedEngine, source: GatedSource, sink: Sink
) -> None:
    begun = []

    class SlowSource(GatedSource):
        def open(self) -> SpeechEngine:
            begun.append(1)
            assert self.gate.wait(30), "the test never opened the gate"
            raise StoreDamaged("/a/place", "is gone")

    source.gate.clear()
    thread = SpeechThread(SlowSource(**vars(source)), sink)
    thread.start()
    for name in ("a", "b"):
        thread.submit(replace(speech(omni), request_id=name))
    wait_until(lambda: bool(begun))
    stopper = threading.Thread(target=thread.stop)
    stopper.start()
    wait_until(thread._is_stopping.is_set)
    source.gate.set()
    stopper.join(30)
    assert not stopper.is_alive() and len(begun) == 1 and set(sink.ends) == {"a"}


def wait_until(is_so: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_states_of_open_speeches_are_bounded(
    omni: LoadedEngine, source: SpeechSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait hold theirs too. One always fits, and text needs none."""
    desk = SpeechDesk(source, lambda events: None, lambda: 0)
    seen = speech_request(omni, *CONVERSATIONS["image"], name="a")
    capture = desk.check(seen)
    row_bytes = omni.config.hidden_size * omni.dtype.itemsize
    monkeypatch.setattr(speech_desk, "MOST_OPEN_BYTES", capture.num_states * row_bytes)
    assert desk.take(seen, capture)
    other = replace(seen, request_id="b")
    with pytest.raises(QueueFull):
        desk.check(other)
    assert desk.check(speech_request(omni, *CONVERSATIONS["text"], name="c")).num_states == 0
    desk.forget(["a"])
    assert desk.check(other).is_needed
