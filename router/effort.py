"""How many experts a token gets: the effort of a request. Pure functions; `router.steering` asks them.

WAKE is half the checkpoint's own number K, FOCUS is K, CRISIS twice it (4, 8 and 16 for K = 8), never more than there
are experts. A request keeps one of them, or follows its own signals (`auto`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Effort = Literal["wake", "focus", "crisis"]
EffortChoice = Literal["wake", "focus", "crisis", "auto"]
EFFORTS: tuple[Effort, ...] = ("wake", "focus", "crisis")
EFFORT_CHOICES: tuple[EffortChoice, ...] = (*EFFORTS, "auto")

LEARN_TOKENS = 8
"""Tokens before the first change: a level needs something to be compared with."""
MEMORY_TOKENS = 64
"""What is usual is a moving average over about this many tokens."""
SMOOTH_TOKENS = 4
"""The level is a moving average over about this many tokens."""
ENTER, LEAVE = 0.75, 0.25
"""Level, in mean deviations from the usual, at which WAKE or CRISIS begins, and below which it ends."""
LEAST_DEVIATION = 1e-4


def experts_at(effort: Effort, native_k: int, num_experts: int) -> int:
    """Experts per token, from 1 to `num_experts`."""
    if effort == "wake":
        return max(1, native_k // 2)
    return min(num_experts, native_k * 2) if effort == "crisis" else native_k


def present_effort(effort: Effort, native_k: int, num_experts: int) -> str:
    """The name with what it means, as users read it: "WAKE (k=4, reduced)"."""
    k = experts_at(effort, native_k, num_experts)
    note = ", native" if k == native_k else ", reduced" if k < native_k else ""
    return f"{effort.upper()} (k={k}{note})"


@dataclass(frozen=True)
class EffortControl:
    """What `auto` remembers of one request."""

    effort: Effort = "focus"
    num_seen: int = 0
    usual: float = 0.0
    """Moving average of the drive."""
    deviation: float = 0.0
    """Moving average of its distance from the usual."""
    level: float = 0.0
    """Smoothed distance of the drive from the usual, in deviations."""


def follow(control: EffortControl, arousal: float, conflict: float, *, is_free: bool) -> EffortControl:
    """The control after one more token, whose signals are means over the layers, in [0, 1].

    The drive is the mean of both signals. It is judged by what is usual in this request, since the size of either
    depends on the model. is_free: whether the effort may change; a prompt only teaches what is usual.
    """
    drive = (arousal + conflict) / 2
    rate = 1 / min(control.num_seen + 1, MEMORY_TOKENS)
    distance = drive - control.usual if control.num_seen else 0.0
    deviation = control.deviation + (abs(distance) - control.deviation) * rate
    judged = distance / max(control.deviation, LEAST_DEVIATION) if control.num_seen >= LEARN_TOKENS else 0.0
    level = control.level + (judged - control.level) / SMOOTH_TOKENS
    after = replace(
        control,
        num_seen=control.num_seen + 1,
        usual=control.usual + (drive - control.usual) * rate,
        deviation=deviation,
        level=level,
    )
    return replace(after, effort=_next_effort(control.effort, level)) if is_free else after


def _next_effort(effort: Effort, level: float) -> Effort:
    """Hysteresis: what has begun lasts until the level has come back further than it took to begin."""
    if level >= ENTER:
        return "crisis"
    if level <= -ENTER:
        return "wake"
    if (effort == "crisis" and level > LEAVE) or (effort == "wake" and level < -LEAVE):
        return effort
    return "focus"
