"""The loop of `sage-moe status --watch`: asks a service again and again, and draws what it says until Ctrl-C.

In a terminal a picture that is drawn anew, where that cannot be, lines. A service that goes away is waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live

from extraction.errors import one_line
from gateway.errors import ServiceUnreachable
from gateway.operations.watch_state import Status, WatchState, answered, unanswered
from gateway.operations.watch_view import decision_line, render_watch, watch_line
from gateway.text.terminal_text import safe_text

Fetch = Callable[[], Status]
"""Raises ServiceUnreachable, or ServiceRefuses where asking again is of no use."""


def watch(
    fetch: Fetch, url: str, console: Console, interval_s: float, is_json: bool = False, num_looks: int = 0
) -> None:
    """Until interrupted, or for so many looks where that is not 0. Raises what the first `fetch` raises, and
    ServiceRefuses whenever it comes."""
    looks = _looks(fetch, interval_s, num_looks)
    try:
        if is_json:
            for state in looks:
                if not state.is_lost:
                    print(json.dumps(state.status), flush=True)
        elif console.is_terminal and not console.is_dumb_terminal:
            _draw(looks, url, console)
        else:
            _print_lines(looks)
    except KeyboardInterrupt:
        return


def _looks(fetch: Fetch, interval_s: float, num_looks: int) -> Iterator[WatchState]:
    state = answered(WatchState(), fetch(), time.monotonic(), _clock())
    yield state
    count = 1
    while count != num_looks:
        time.sleep(interval_s)
        try:
            state = answered(state, fetch(), time.monotonic(), _clock())
        except ServiceUnreachable as error:
            state = unanswered(state, error.reason, time.monotonic(), _clock())
        yield state
        count += 1


def _draw(looks: Iterator[WatchState], url: str, console: Console) -> None:
    first = next(looks)

    def picture(state: WatchState) -> Any:
        return render_watch(state, url, console.height, time.monotonic())

    with Live(picture(first), console=console, screen=True, auto_refresh=False) as live:
        for state in looks:
            live.update(picture(state), refresh=True)


def _print_lines(looks: Iterator[WatchState]) -> None:
    """A line a look, and one for every decision that was not told yet."""
    told: set[tuple[str, ...]] = set()
    was_lost = False
    for count, state in enumerate(looks):
        status = state.status or {}
        for decision in [] if state.is_lost else (status.get("cluster") or {}).get("decisions", ()):
            known = tuple(str(decision[key]) for key in ("at", "kind", "name", "reason"))
            if known not in told and count:
                _write(decision_line(decision))
            told.add(known)
        if state.events and state.is_lost != was_lost:
            _write(state.events[-1])
        elif not state.is_lost:
            _write(watch_line(state, _clock()))
        was_lost = state.is_lost


def _write(line: str) -> None:
    print(safe_text(one_line(line)), flush=True)


def _clock() -> str:
    return time.strftime("%H:%M:%SZ", time.gmtime())
