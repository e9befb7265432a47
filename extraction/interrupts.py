"""Signals that ask the process to end, while there is something to remove first.

Python turns SIGINT into an exception, but SIGTERM and SIGHUP end the process on the spot. Called by
`extraction.atomic_folder`. Does nothing outside the main thread, where Python allows no handlers, nor where the program
handles these signals itself. Nothing helps against SIGKILL.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_FATAL = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_as_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit with the code that a shell reports for them, SIGINT KeyboardInterrupt.

    That is what the block ends with, whatever it met on its way out: an exception that comes between two steps of
    Python's own locks makes these raise errors of their own.
    """
    received: list[BaseException] = []

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        asked = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        received.append(asked)
        raise asked

    replaced = [number for number in _FATAL if signal.getsignal(number) is signal.SIG_DFL]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        replaced.append(signal.SIGINT)
    with _handled(replaced, interrupt):
        try:
            yield
        except Exception as error:
            if received:
                raise received[0] from error
            raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores the signals that ask for an end: a second Ctrl-C must not stop the cleaning up."""
    with _handled([signal.SIGINT, *_FATAL], signal.SIG_IGN):
        yield


@contextmanager
def _handled(numbers: list[signal.Signals], handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            if old is not None:
                signal.signal(number, old)
