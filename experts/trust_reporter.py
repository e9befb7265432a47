"""Brings what a process observes to whoever keeps it, every few seconds, from a thread of its own.

Trust is advice: when it cannot be kept, that is said in the log and tried again later, and nothing else stops.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from experts.errors import ExpertError
from experts.trust import TrustReport, TrustTable
from experts.trust_book import TrustBook

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


class TrustKeeper(Protocol):
    """The owner of a ledger, or the way to it."""

    def table(self) -> TrustTable:
        """What is kept now. Raises ExpertError."""
        ...

    def add(self, report: TrustReport) -> TrustTable:
        """Returns what is kept with the report, once it is on disk. Raises ExpertError; it may then be sent again."""
        ...

    def close(self) -> None: ...


class TrustReporter:
    """Owns the keeper from `__init__` to `close`."""

    def __init__(
        self,
        book: TrustBook,
        keeper: TrustKeeper,
        flush: Callable[[], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        """flush: makes the book up to date before a report."""
        self._book, self._keeper, self._flush, self._interval_s = book, keeper, flush, interval_s
        self._closing = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="trust-reporter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, then close the keeper."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            self._keeper.close()

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._send()
        self._send()
        self._send()  # the first may have been what failed before

    def _send(self) -> None:
        self._flush()
        report = self._book.report()
        if report is None:
            return
        try:
            self._book.settle(self._keeper.add(report))
        except ExpertError as error:
            if not self._has_failed:
                logger.warning("trust is learned but not kept for now: %s", error)
            self._has_failed = True
        else:
            self._has_failed = False
