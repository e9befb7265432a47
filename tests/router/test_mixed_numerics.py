"""Answers that experts of another numerics class took part in are marked, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from router.engine import Engine
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from tests.engines import open_engine
from tests.expert_servers import PATIENT, SECRET, expert_servers

OTHER = "another/class"
REQUEST = GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=4, temperature=0.0))


@pytest.fixture
def foreign(tiny_store: Path) -> Iterator[tuple[LoadedEngine, RemoteDirectory, Roster]]:
    """An engine whose experts are on actors of another class, its directory, and the roster that lists them."""
    with expert_servers(tiny_store, 2, "float32", numerics_class=OTHER) as roster:
        loaded = open_engine(
            tiny_store,
            EngineOptions(dtype="float32"),
            lambda worker: RemoteDirectory(worker, roster, SECRET, limits=PATIENT),
        )
        assert isinstance(loaded.directory, RemoteDirectory)
        try:
            yield loaded, loaded.directory, roster
        finally:
            loaded.close()


def _events(engine: Engine, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.submit(request)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def test_experts_of_another_class_mark_the_answer(
    foreign: tuple[LoadedEngine, RemoteDirectory, Roster],
) -> None:
    loaded, _, _ = foreign
    events = _events(loaded.engine, REQUEST)["r"]
    assert len(events) == 4 and all(event.is_mixed for event in events)


def test_experts_of_this_process_do_not(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"))
    assert not any(event.is_mixed for event in _events(loaded.engine, REQUEST)["r"])
    loaded.close()


def test_mark_stays_when_the_others_have_gone_and_later_requests_have_none(
    foreign: tuple[LoadedEngine, RemoteDirectory, Roster],
) -> None:
    """What was computed of the request rests on them all the same."""
    loaded, directory, roster = foreign
    loaded.engine.submit(REQUEST)
    loaded.engine.step()
    directory.update(Roster(roster.version + 1, {}, roster.owners))
    later = replace(REQUEST, request_id="later")
    loaded.engine.submit(later)
    events: list[TokenEvent] = []
    while loaded.engine.has_work:
        events += loaded.engine.step()
    assert all(event.is_mixed == (event.request_id == "r") for event in events)
    assert {event.request_id for event in events} == {"r", "later"}


def test_choices_that_share_a_marked_prompt_are_marked(
    foreign: tuple[LoadedEngine, RemoteDirectory, Roster],
) -> None:
    loaded, directory, roster = foreign
    prompt = tuple(range(1, 80))
    first = replace(REQUEST, prompt_ids=prompt, group="g")
    loaded.engine.submit(first)
    loaded.engine.submit(replace(first, request_id="second"))
    loaded.engine.step()
    directory.update(Roster(roster.version + 1, {}, roster.owners))
    events: list[TokenEvent] = []
    while loaded.engine.has_work:
        events += loaded.engine.step()
    assert {event.request_id for event in events if event.is_mixed} == {"r", "second"}


def test_merged_events_keep_the_mark() -> None:
    plain, mixed = TokenEvent("r", (1,)), TokenEvent("r", (2,), is_mixed=True)
    assert plain.followed_by(mixed).is_mixed and mixed.followed_by(plain).is_mixed
    assert not plain.followed_by(plain).is_mixed
