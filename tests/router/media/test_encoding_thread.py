"""Requests with media on their way to the engine: encoded beside it, cancelled, failed, and what health says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from experts.errors import StoreDamaged
from experts.numerics import computing_threads
from router import side_thread
from router.engine import Engine
from router.engine_thread import MOST_WAITING_WITH_MEDIA, EngineThread
from router.errors import PromptInvalid
from router.loading import LoadedEngine
from router.media.encoder import MediaEncoder
from router.prompt_inputs import PromptInputs
from router.request import GenerationRequest, TokenEvent
from tests.engines import run_to_end, small_engine
from tests.omni import image, request, sound
from tests.router.test_engine_thread import Sink

TEXT = (1, 2, 3)


class GatedEncoder(MediaEncoder):
    """Waits for its gate and fails when told to."""

    def __init__(self, omni: LoadedEngine) -> None:
        super().__init__(omni.store, omni.config, omni.kernel, omni.dtype)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.seen: list[str] = []

    def inputs_for(
        self, request: GenerationRequest, is_wanted: Callable[[], bool] = lambda: True
    ) -> PromptInputs:
        self.seen.append(request.request_id)
        self.entered.set()
        assert self.gate.wait(30), "the test never opened the gate"
        if self.failure is not None:
            raise self.failure
        return super().inputs_for(request, is_wanted)


@pytest.fixture
def encoder(omni: LoadedEngine) -> GatedEncoder:
    return GatedEncoder(omni)


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def thread(omni: LoadedEngine, encoder: GatedEncoder, sink: Sink) -> Iterator[EngineThread]:
    thread = EngineThread(small_engine(omni, 16), sink, encoder)
    thread.start()
    yield thread
    encoder.gate.set()
    thread.stop()


def test_media_are_encoded_and_the_answers_are_those_without_threads(
    omni: LoadedEngine, thread: EngineThread, sink: Sink
) -> None:
    asked = [
        request(omni, image(16, 24), TEXT, name="image"),
        request(omni, TEXT * 4, name="text"),
        request(omni, sound(1.2), TEXT, name="sound"),
    ]
    for one in asked:
        thread.submit(one)
    sink.wait_for_ends("image", "text", "sound")
    for one in asked:
        outcome = run_to_end(small_engine(omni, 16), [one], encoder=omni.media)
        assert sink.tokens[one.request_id] == outcome.tokens[one.request_id]


def test_text_does_not_wait_for_media(
    omni: LoadedEngine, encoder: GatedEncoder, thread: EngineThread, sink: Sink
) -> None:
    encoder.gate.clear()
    thread.submit(request(omni, image(16, 24), TEXT, name="image"))
    assert encoder.entered.wait(30)
    health = thread.health()
    assert health.is_alive and not health.has_work and health.num_waiting == 1
    thread.submit(request(omni, TEXT, name="text"))
    sink.wait_for_ends("text")
    assert "image" not in sink.ends
    encoder.gate.set()
    sink.wait_for_ends("image")
    assert sink.ends["image"].finish_reason == "length"


def test_only_the_encoding_thread_computes_with_half_of_the_cores(
    omni: LoadedEngine, encoder: GatedEncoder, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_thread, "num_cores", lambda: 6)
    engine = small_engine(omni, 16)
    seen: dict[str, int] = {}
    step, encode = engine.step, encoder.inputs_for

    def watched_step() -> list[TokenEvent]:
        seen["engine"] = torch.get_num_threads()
        return step()

    def watched_encode(asked: GenerationRequest, is_wanted: Callable[[], bool]) -> PromptInputs:
        seen["media"] = torch.get_num_threads()
        return encode(asked, is_wanted)

    engine.step = watched_step  # type: ignore[method-assign]
    encoder.inputs_for = watched_encode  # type: ignore[method-assign]
    with computing_threads(5):
        thread = EngineThread(engine, sink, encoder)
        thread.start()
        later = threading.Thread(target=lambda: seen.update(later=torch.get_num_threads()))
        later.start()
        later.join()
        thread.submit(request(omni, image(16, 24), TEXT, name="r"))
        sink.wait_for_ends("r")
        thread.stop()
        assert torch.get_num_threads() == 5
    assert seen == {"engine": 5, "media": 3, "later": 5}


def test_request_cancelled_while_it_is_encoded_ends_at_once(
    omni: LoadedEngine, encoder: GatedEncoder, thread: EngineThread, sink: Sink
) -> None:
    encoder.gate.clear()
    for name in ("first", "second", "third"):
        thread.submit(request(omni, image(16, 24), TEXT, name=name))
    assert encoder.entered.wait(30)
    thread.cancel("first")
    thread.cancel("second")
    sink.wait_for_ends("first", "second")
    assert {sink.ends[name].finish_reason for name in ("first", "second")} == {"cancelled"}
    encoder.gate.set()
    sink.wait_for_ends("third")
    assert sink.ends["third"].finish_reason == "length"
    assert encoder.seen == ["first", "third"], "nothing is encoded for who has gone"
    assert thread.num_open == 0


def test_request_cancelled_among_its_media_has_no_more_of_them_encoded(
    omni: LoadedEngine, encoder: GatedEncoder, thread: EngineThread, sink: Sink
) -> None:
    encoder.gate.clear()
    thread.submit(request(omni, *(image(16, 24, seed) for seed in range(5)), TEXT, name="first"))
    assert encoder.entered.wait(30)
    thread.cancel("first")
    sink.wait_for_ends("first")
    encoder.gate.set()
    thread.submit(request(omni, image(16, 24, 9), TEXT, name="second"))
    sink.wait_for_ends("second")
    assert sink.ends["second"].finish_reason == "length"
    assert encoder.stats.encoded == 1, "that of the second"


def test_only_some_requests_are_encoded_ahead_of_their_turn(
    omni: LoadedEngine, encoder: GatedEncoder, sink: Sink
) -> None:
    """The engine has room for one at a time; all come to their end, in order."""
    engine = small_engine(omni, 1)
    thread = EngineThread(engine, sink, encoder)
    most = 0
    run = engine.step

    def watched() -> list[TokenEvent]:
        nonlocal most
        most = max(most, engine.num_waiting_with_media)
        return run()

    engine.step = watched  # type: ignore[method-assign]
    names = [f"r{number}" for number in range(3 * MOST_WAITING_WITH_MEDIA)]
    thread.start()
    for name in names:
        thread.submit(request(omni, image(16, 24), TEXT, name=name, max_tokens=40))
    sink.wait_for_ends(*names)
    thread.stop()
    assert {sink.ends[name].finish_reason for name in names} == {"length"}
    assert list(sink.ends) == names
    assert 0 < most <= MOST_WAITING_WITH_MEDIA


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (PromptInvalid("no tokens"), "the prompt cannot be computed: no tokens"),
        (StoreDamaged("/a/secret/place", "is cut short"), "an image or a sound could not be encoded"),
        (MemoryError("12 bytes"), "an image or a sound could not be encoded"),
        (OSError("/a/secret/place"), "an image or a sound could not be encoded"),
        (KeyError("a mistake"), "an image or a sound could not be encoded"),
    ],
)
def test_failure_ends_its_request_alone(
    omni: LoadedEngine,
    encoder: GatedEncoder,
    thread: EngineThread,
    sink: Sink,
    failure: Exception,
    told: str,
) -> None:
    encoder.failure = failure
    thread.submit(request(omni, image(16, 24), TEXT, name="failed"))
    sink.wait_for_ends("failed")
    assert (sink.ends["failed"].finish_reason, sink.ends["failed"].error) == ("error", told)
    encoder.failure = None
    thread.submit(request(omni, image(16, 24), TEXT, name="next"))
    sink.wait_for_ends("next")
    assert sink.ends["next"].finish_reason == "length"


def test_queue_that_changes_while_it_is_counted_is_counted_again(
    omni: LoadedEngine, thread: EngineThread, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(engine: Engine) -> int:
        counted.append(engine)
        if len(counted) == 1:
            raise RuntimeError("OrderedDict changed size during iteration")
        return 0

    monkeypatch.setattr(Engine, "num_waiting_with_media", property(count))
    thread.submit(request(omni, image(16, 24), TEXT, name="r"))
    sink.wait_for_ends("r")
    assert sink.ends["r"].finish_reason == "length"


def test_tokens_that_do_not_fit_media_end_the_request(
    omni: LoadedEngine, thread: EngineThread, sink: Sink
) -> None:
    asked = request(omni, image(16, 24), TEXT, name="r")
    thread.submit(replace(asked, prompt_ids=TEXT))
    sink.wait_for_ends("r")
    assert "no 6 tokens of media" in str(sink.ends["r"].error)


def test_engine_without_an_encoder_refuses_media(omni: LoadedEngine, sink: Sink) -> None:
    thread = EngineThread(small_engine(omni, 16), sink)
    thread.start()
    with pytest.raises(PromptInvalid, match="no images"):
        thread.submit(request(omni, image(16, 24), TEXT))
    thread.stop()


def test_stop_does_not_wait_for_what_is_queued(omni: LoadedEngine, encoder: GatedEncoder, sink: Sink) -> None:
    thread = EngineThread(small_engine(omni, 16), sink, encoder)
    thread.start()
    encoder.gate.clear()
    for name in ("first", "second"):
        thread.submit(request(omni, image(16, 24), TEXT, name=name))
    assert encoder.entered.wait(30)
    threading.Timer(0.2, encoder.gate.set).start()
    thread.stop()
    assert encoder.seen == ["first"]
