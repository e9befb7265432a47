"""Speeches hold the contract of docs/exactness.md: nothing but the request decides their codes.

The reference is each speech alone, all experts in memory, its prompt in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from experts.numerics import computing_threads
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams
from router.speech import code_predictor
from router.speech.speaker import SpeakerLimits
from tests.engines import open_engine
from tests.omni import image, sound
from tests.speech import (
    Speeches,
    Turn,
    answered,
    asked,
    new_speaker,
    resumed,
    speak,
    speech_request,
    told,
)

TEXT = tuple(range(32, 96))
CONVERSATIONS: tuple[tuple[Turn, ...], ...] = (
    (asked(TEXT),),
    (told("Be short."), asked(TEXT, image(72, 72)), answered("So."), asked(TEXT * 2)),
    (asked(sound(1.7)),),
    (asked(sound(0.8, 1), image(16, 40, 1)), answered("Both."), asked(TEXT)),
)
JOIN_AT = (0, 3, 1, 7)
VOICES = ("ethan", "chelsie", "aiden", "ethan")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(omni_store: Path, request: pytest.FixtureRequest) -> Iterator[LoadedEngine]:
    options = EngineOptions(dtype=str(request.param), has_media=True, prefix_cache=False)
    loaded = open_engine(omni_store, options)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def requests(loaded: LoadedEngine) -> list[GenerationRequest]:
    made = []
    for number, turns in enumerate(CONVERSATIONS):
        sampling = SamplingParams(
            max_tokens=11 + number,
            temperature=(0.9, 0.0)[number % 2],
            top_k=50,
            repetition_penalty=1.05,
            seed=number,
        )
        made.append(
            speech_request(loaded, *turns, name=f"s{number}", voice=VOICES[number], sampling=sampling)
        )
    return made


@pytest.fixture(scope="module")
def reference(loaded: LoadedEngine, requests: list[GenerationRequest]) -> Speeches:
    return _alone(loaded, requests)


def _alone(loaded: LoadedEngine, requests: Sequence[GenerationRequest]) -> Speeches:
    whole = Speeches({}, {})
    for request in requests:
        one = speak(loaded, new_speaker(loaded, limits=SpeakerLimits(prompt_rows=4096)), [request])
        whole.frames.update(one.frames)
        whole.ends.update(one.ends)
    return whole


@pytest.mark.parametrize("prompt_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("most_running", [1, 3, 8])
def test_chunks_and_neighbours_change_no_code(
    loaded: LoadedEngine,
    requests: list[GenerationRequest],
    reference: Speeches,
    prompt_rows: int,
    most_running: int,
) -> None:
    speaker = new_speaker(loaded, limits=SpeakerLimits(most_running, prompt_rows))
    assert speak(loaded, speaker, requests, JOIN_AT) == reference


@pytest.mark.parametrize("num_experts", [1, 3])
def test_expert_budgets_change_no_code(
    loaded: LoadedEngine, requests: list[GenerationRequest], reference: Speeches, num_experts: int
) -> None:
    expert_bytes = 3 * 20 * 48 * loaded.dtype.itemsize
    speaker = new_speaker(loaded, budget_bytes=num_experts * expert_bytes)
    assert speak(loaded, speaker, requests, JOIN_AT) == reference
    assert speaker.parts.worker.num_resident <= num_experts
    assert speaker.parts.worker.stats.misses > 20


def test_preempted_speeches_change_no_code(loaded: LoadedEngine) -> None:
    sampling = SamplingParams(max_tokens=80, temperature=0.0, repetition_penalty=1.05)
    longer = [
        speech_request(loaded, asked(TEXT[number:]), name=f"s{number}", voice=voice, sampling=sampling)
        for number, voice in enumerate(VOICES)
    ]
    speaker = new_speaker(loaded, num_blocks=7)
    assert speak(loaded, speaker, longer) == _alone(loaded, longer)
    assert speaker.stats.preemptions > 0


@pytest.mark.parametrize("num_told", range(1, 11))
def test_resumed_speech_goes_on_with_the_same_frames(
    loaded: LoadedEngine, requests: list[GenerationRequest], reference: Speeches, num_told: int
) -> None:
    again = [resumed(request, reference.of(request.request_id)[:num_told]) for request in requests]
    found = speak(loaded, new_speaker(loaded), again, JOIN_AT)
    assert found.ends == reference.ends
    for name, frames in reference.frames.items():
        assert found.of(name) == frames[num_told:]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_code(
    loaded: LoadedEngine, requests: list[GenerationRequest], reference: Speeches, num_threads: int
) -> None:
    if loaded.kernel.product != "native":
        pytest.skip("a library's products are proven for one number of threads")
    with computing_threads(num_threads):
        assert speak(loaded, new_speaker(loaded), requests, JOIN_AT) == reference


def test_speeches_of_other_seeds_choices_voices_and_replies_differ(loaded: LoadedEngine) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0.9, seed=1)
    turns = CONVERSATIONS[0]
    requests = [
        speech_request(loaded, *turns, name="first", sampling=sampling),
        speech_request(loaded, *turns, name="seed", sampling=replace(sampling, seed=2)),
        speech_request(loaded, *turns, name="choice", sampling=replace(sampling, choice=1)),
        speech_request(loaded, *turns, name="voice", sampling=sampling, voice="chelsie"),
        speech_request(loaded, *turns, name="reply", sampling=sampling, reply=tuple(b"No, never.")),
    ]
    found = speak(loaded, new_speaker(loaded), requests)
    assert len({tuple(frames) for frames in found.frames.values()}) == len(requests)


def test_code_predictor_s_layers_in_one_call_draw_the_codes_of_layer_after_layer(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=0.9, top_k=50, seed=1)
    requests = [
        speech_request(loaded, *turns, name=f"s{number}", sampling=sampling)
        for number, turns in enumerate(CONVERSATIONS)
    ]
    expected = speak(loaded, new_speaker(loaded), requests, JOIN_AT)
    num_runs = 0

    def apart(*arguments: object) -> None:
        nonlocal num_runs
        num_runs += 1

    monkeypatch.setattr(code_predictor, "find_run", apart)
    assert speak(loaded, new_speaker(loaded), requests, JOIN_AT) == expected
    assert num_runs


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_talker_speaks_alike_at_any_budget_and_beside_others(
    omni_checkpoint: Path, omni_store: Path, tmp_path: Path, scheme: Literal["int8", "int4"]
) -> None:
    form = Quantization(scheme=scheme, group_size=32 if scheme == "int4" else None)
    extract(omni_checkpoint, tmp_path / "store", quantised=QuantisedParts(form, form, form))
    loaded = open_engine(tmp_path / "store", EngineOptions(dtype="float32", has_media=True))
    sampling = SamplingParams(max_tokens=8, temperature=0.9, top_k=50, seed=1)
    requests = [
        speech_request(loaded, *turns, name=f"s{number}", sampling=sampling)
        for number, turns in enumerate(CONVERSATIONS)
    ]
    speaker = new_speaker(loaded, budget_bytes=6000, limits=SpeakerLimits(prompt_rows=16))
    assert speak(loaded, speaker, requests, JOIN_AT) == _alone(loaded, requests)
    assert 0 < speaker.parts.worker.num_resident < 12
    plain = new_speaker(open_engine(omni_store, EngineOptions(dtype="float32", has_media=True)))
    assert speaker.parts.predictor.nbytes < plain.parts.predictor.nbytes
    loaded.close()
