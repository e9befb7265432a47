"""Signals that ask for an end while there is something to clean up."""

from __future__ import annotations

import os
import signal

import pytest

from extraction.interrupts import signals_as_exit, uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_ends_with_its_code_whatever_it_breaks_on_the_way_out(number: int, code: int) -> None:
    """As Python's own conditions do, whose locks an exception may leave released twice."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, signals_as_exit():
            try:
                os.kill(os.getpid(), number)
            finally:
                raise RuntimeError("cannot release un-acquired lock")
        assert ended.value.code == code
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_ctrl_c_stays_one() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), signals_as_exit():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                raise RuntimeError("cannot release un-acquired lock")
    finally:
        signal.signal(signal.SIGINT, before)


def test_error_without_a_signal_is_itself() -> None:
    with pytest.raises(ValueError, match="its own"), signals_as_exit():
        raise ValueError("its own")


def test_nothing_interrupts_the_cleaning_up() -> None:
    with uninterrupted():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
