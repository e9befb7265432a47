"""Fixtures of the data plane's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.experts.wire_peers import nothing_left_behind


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Fails a test that leaves a thread or a socket behind."""
    with nothing_left_behind():
        yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the data plane logs, as it comes."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, keep = logging.getLogger("experts.transport"), Keep(logging.WARNING)
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)
