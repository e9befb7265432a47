"""States that stand for media: the same bits however the engine comes to them, and computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from router.engine import Engine
from router.loading import EngineOptions, LoadedEngine
from router.prefix_keys import PrefixScope
from router.request import GenerationRequest, SamplingParams
from router.speech.states import KeptStates
from tests.engines import open_engine, run_to_end, small_engine
from tests.omni import image, sound
from tests.speech import (
    Turn,
    answered,
    asked,
    compute_states,
    new_capture,
    speech_request,
    states_for,
    told,
)

TEXT = tuple(range(32, 96))
FIRST: tuple[Turn, ...] = (told("x" * 150), asked(TEXT, image(72, 72)))
SECOND: tuple[Turn, ...] = (*FIRST, answered("A cat."), asked(sound(1.7), TEXT))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(omni_store: Path, request: pytest.FixtureRequest) -> Iterator[LoadedEngine]:
    options = EngineOptions(dtype=str(request.param), has_media=True, prefix_cache=False)
    loaded = open_engine(omni_store, options)
    yield loaded
    loaded.close()


def _anew(loaded: LoadedEngine, request: GenerationRequest) -> torch.Tensor:
    states = states_for(loaded, request)
    assert states is not None
    return states


def _engine_with_prefixes(loaded: LoadedEngine) -> Engine:
    engine = small_engine(loaded, 24)
    engine.kv.scope = PrefixScope("store", "class", 2)
    return engine


@pytest.mark.parametrize("chunk", [4, 17, 64])
def test_states_do_not_depend_on_how_the_prompt_is_cut(loaded: LoadedEngine, chunk: int) -> None:
    request = speech_request(loaded, *SECOND)
    cut = states_for(loaded, request, chunk)
    assert cut is not None and torch.equal(cut, _anew(loaded, request))


def test_states_behind_a_found_prefix_are_those_of_the_whole_prompt(loaded: LoadedEngine) -> None:
    """What stands before the first of them may be found computed; what they are made from may not."""
    request = speech_request(loaded, *FIRST)
    text = replace(request, request_id="t", speech=None, sampling=SamplingParams(max_tokens=2))
    engine = _engine_with_prefixes(loaded)
    run_to_end(engine, [text], encoder=loaded.media)
    capture = new_capture(loaded, request)
    compute_states(loaded, engine, capture, request)
    assert engine.kv.num_hit_positions == request.media[0].first // 64 * 64 > 0
    found = capture.states()
    assert found is not None and torch.equal(found, _anew(loaded, request))


def test_next_turn_needs_the_states_of_its_own_media_alone(loaded: LoadedEngine) -> None:
    kept, engine = KeptStates(lambda: 0), _engine_with_prefixes(loaded)
    first, second = (speech_request(loaded, *turns) for turns in (FIRST, SECOND))
    text = replace(second, request_id="t", speech=None, sampling=SamplingParams(max_tokens=2))
    capture = new_capture(loaded, first, kept)
    compute_states(loaded, engine, capture, first)
    capture.keep()
    run_to_end(engine, [text], encoder=loaded.media)
    capture = new_capture(loaded, second, kept)
    num_rows = compute_states(loaded, engine, capture, second)
    own, last = second.media[1].first, second.prompt_ids.index(TEXT[0], second.media[1].first)
    assert num_rows < last - own // 64 * 64
    found = capture.states()
    assert found is not None and torch.equal(found, _anew(loaded, second))


def test_turn_without_media_of_its_own_needs_no_engine(loaded: LoadedEngine) -> None:
    kept = KeptStates(lambda: 0)
    first, second = (
        speech_request(loaded, *turns) for turns in (FIRST, (*FIRST, answered("A cat."), asked(TEXT)))
    )
    capture = new_capture(loaded, first, kept)
    compute_states(loaded, small_engine(loaded, 24), capture, first)
    capture.keep()
    capture = new_capture(loaded, second, kept)
    found = capture.states()
    assert not capture.is_needed
    assert found is not None and torch.equal(found, _anew(loaded, second))


def test_nobody_finds_what_differs_in_owner_text_or_medium(loaded: LoadedEngine) -> None:
    kept = KeptStates(lambda: 0)
    request = speech_request(loaded, *FIRST)
    capture = new_capture(loaded, request, kept)
    compute_states(loaded, small_engine(loaded, 24), capture, request)
    assert new_capture(loaded, request, kept).is_needed, "nothing was kept yet"
    capture.keep()
    assert not new_capture(loaded, request, kept).is_needed
    others = (
        replace(request, owner="somebody"),
        speech_request(loaded, told("y" * 150), FIRST[1]),
        speech_request(loaded, FIRST[0], asked(TEXT, image(72, 72, 1))),
    )
    for other in others:
        assert new_capture(loaded, other, kept).is_needed


def test_what_was_kept_before_something_was_found_wrong_is_not_found(loaded: LoadedEngine) -> None:
    """Not even where it was on its way at that time."""
    num_doubts = 0
    kept = KeptStates(lambda: num_doubts)
    request = speech_request(loaded, *FIRST)
    capture = new_capture(loaded, request, kept)
    compute_states(loaded, small_engine(loaded, 24), capture, request)
    num_doubts = 1
    capture.keep()
    assert new_capture(loaded, request, kept).is_needed
    num_doubts = 0
    assert not new_capture(loaded, request, kept).is_needed


def test_conversation_without_media_has_no_states(loaded: LoadedEngine) -> None:
    capture = new_capture(loaded, speech_request(loaded, asked(TEXT)))
    assert not capture.is_needed
    assert capture.states() is None


def test_oldest_states_go_first_where_there_is_no_room() -> None:
    kept = KeptStates(lambda: 0, most_bytes=3 * 64)
    rows = torch.zeros(4, 4)
    for name in (b"a", b"b", b"c"):
        kept.keep(name, rows)
    assert kept.find(b"a") is rows
    kept.keep(b"d", rows)
    kept.keep(b"d", rows)
    assert kept.nbytes == 3 * 64
    assert [name for name in (b"a", b"b", b"c", b"d") if kept.find(name) is None] == [b"b"]
