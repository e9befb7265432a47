"""How far a long command has come, on stderr. Called by the commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

LINE_INTERVAL_S = 5.0
"""Between two lines of progress where stderr is no terminal."""


@contextmanager
def shown_progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with elapsed and remaining time on a terminal, else a line now and then; both on stderr.

    unit: what is counted, in the plural. Yields what to call with (done, total).
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(time.monotonic, lambda line: typer.echo(line, err=True), unit).show
        return
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ProgressLines:
    """Plain lines: the first and the last report, and others LINE_INTERVAL_S apart."""

    def __init__(self, clock: Callable[[], float], write: Callable[[str], None], unit: str) -> None:
        self._clock, self._write, self._unit = clock, write, unit
        self._started_at: float | None = None
        self._shown_at = 0.0
        self._first_done = 0

    def show(self, done: int, total: int) -> None:
        """done: what has ended, that of earlier runs included."""
        now = self._clock()
        if self._started_at is None:
            self._started_at, self._first_done = now, done
        elif done < total and now - self._shown_at < LINE_INTERVAL_S:
            return
        self._shown_at = now
        self._write(f"{done} of {total} {self._unit}{self._rate(done, total, now - self._started_at)}")

    def _rate(self, done: int, total: int, elapsed_s: float) -> str:
        new = done - self._first_done
        if new <= 0 or elapsed_s <= 0.0:
            return ""
        rate = new / elapsed_s
        left = f", about {(total - done) / rate / 60:.1f} min left" if done < total else ""
        return f", {rate:.1f} {self._unit}/s{left}"
