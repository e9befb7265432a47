"""What `sage-moe status --watch` knows: the last answer, rates between answers, and whether the service is there. Pure.

Drawn by `gateway.operations.watch_view`; `gateway.operations.watch` asks the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Status = Mapping[str, Any]
MAX_EVENTS = 4
"""That are remembered for people."""


@dataclass(frozen=True)
class Rates:
    """Tokens a second between the last two answers; None where that is not known."""

    generated: float | None = None
    prompt: float | None = None
    by_router: Mapping[str, float] = field(default_factory=dict)
    """Generated, by name; of those that were there at both answers."""


@dataclass(frozen=True)
class WatchState:
    """Times are of a monotonic clock, in seconds."""

    status: Status | None = None
    """The last answer, however old."""
    answered_at_s: float = 0.0
    rates: Rates = Rates()
    lost_since_s: float | None = None
    """Since when nothing answers."""
    error: str = ""
    events: tuple[str, ...] = ()
    """What happened to the service while it was watched, the last ones."""

    @property
    def is_lost(self) -> bool:
        return self.lost_since_s is not None


def answered(state: WatchState, status: Status, now_s: float, clock: str) -> WatchState:
    """After an answer. clock: the time of day, for people. Raises KeyError or TypeError where it is no status."""
    elapsed_s = now_s - state.answered_at_s
    has_rates = state.status is not None and not state.is_lost and elapsed_s > 0.0
    rates = _rates(state.status or {}, status, elapsed_s) if has_rates else Rates()
    after = WatchState(status, now_s, rates, events=state.events)
    _pids(status), status["requests"]["generated_tokens"]
    if state.lost_since_s is None or state.status is None:
        return after
    how = "answers again" if _pids(state.status) & _pids(status) else "was started anew"
    return _with_event(after, f"{clock} the service {how}, after {now_s - state.lost_since_s:.0f} s")


def unanswered(state: WatchState, error: str, now_s: float, clock: str) -> WatchState:
    """After no answer."""
    if state.is_lost:
        return replace(state, error=error)
    lost = replace(state, lost_since_s=now_s, error=error, rates=Rates())
    return _with_event(lost, f"{clock} the service does not answer: {error}")


def _with_event(state: WatchState, event: str) -> WatchState:
    return replace(state, events=(*state.events, event)[-MAX_EVENTS:])


def _rates(before: Status, now: Status, elapsed_s: float) -> Rates:
    old, new = _requests(before), _requests(now)
    by_router = {
        name: rate
        for name in old.keys() & new.keys()
        if (rate := _rate(old[name], new[name], "generated_tokens", elapsed_s)) is not None
    }
    of_all = (before["requests"], now["requests"])
    generated = _rate(*of_all, "generated_tokens", elapsed_s)
    return Rates(generated, _rate(*of_all, "prompt_tokens", elapsed_s), by_router)


def _rate(before: Status, now: Status, key: str, elapsed_s: float) -> float | None:
    """None where the counter fell: a process is new."""
    grown = now[key] - before[key]
    return grown / elapsed_s if grown >= 0 else None


def _requests(status: Status) -> dict[str, Status]:
    return {each["name"]: each["requests"] for each in status["routers"] if "requests" in each}


def _pids(status: Status) -> set[int]:
    """Of all processes; none of them outlives the service."""
    return {each["pid"] for each in (*status["routers"], *status["actors"]) if "pid" in each}
