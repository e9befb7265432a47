"""Fixtures of the data plane's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.native_plane import plane
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from tests.experts.fleet import Fleet, make_worker
from tests.experts.wire_peers import nothing_left_behind

NEEDS_PLANE = pytest.mark.skipif(plane() is None, reason="needs the C source")


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Fails a test that leaves a thread or a socket behind."""
    with nothing_left_behind():
        yield


@pytest.fixture(params=[False, pytest.param(True, marks=NEEDS_PLANE)], ids=["python", "c"])
def each_reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ends in Python alone, and then with the C source."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr("experts.channel.plane", lambda: None)
            patch.setattr("experts.native_plane.plane", lambda: None)
        patch.setattr("tests.experts.wire_peers.has_desk", request.param)
        yield


class _Keep(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def _lines_of(*names: str) -> Iterator[list[str]]:
    lines: list[str] = []
    keep = _Keep(lines)
    for name in names:
        logging.getLogger(name).addHandler(keep)
    try:
        yield lines
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(keep)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the data plane logs, as it comes."""
    yield from _lines_of("experts.connection", "experts.server")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What a directory over actors logs, as it comes."""
    yield from _lines_of("experts.remote_directory", "experts.links", "experts.audit")


@pytest.fixture(scope="module")
def fleet_store(tiny_store: Path) -> Iterator[ExpertStore]:
    opened = ExpertStore.open(tiny_store)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def local(fleet_store: ExpertStore) -> Iterator[ExpertWorker]:
    """The worker in the router's process, and what every server computes with unless told otherwise."""
    worker = make_worker(fleet_store)
    yield worker
    worker.close()


@pytest.fixture
def fleet(local: ExpertWorker) -> Iterator[Fleet]:
    started = Fleet(local)
    yield started
    started.stop()
