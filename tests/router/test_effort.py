"""Effort is a number of experts, its name says what it means, and `auto` follows signals with hysteresis."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from router.effort import LEARN_TOKENS, Effort, EffortControl, experts_at, follow, present_effort


@pytest.mark.parametrize(
    ("effort", "native_k", "num_experts", "k"),
    [
        ("wake", 8, 128, 4),
        ("focus", 8, 128, 8),
        ("crisis", 8, 128, 16),
        ("crisis", 6, 8, 8),
        ("wake", 1, 8, 1),
        ("wake", 5, 8, 2),
    ],
)
def test_effort_is_half_one_or_two_times_the_native_number(
    effort: Effort, native_k: int, num_experts: int, k: int
) -> None:
    assert experts_at(effort, native_k, num_experts) == k


def test_a_name_says_what_it_means() -> None:
    assert present_effort("wake", 8, 128) == "WAKE (k=4, reduced)"
    assert present_effort("focus", 8, 128) == "FOCUS (k=8, native)"
    assert present_effort("crisis", 8, 128) == "CRISIS (k=16)"
    assert present_effort("crisis", 8, 8) == "CRISIS (k=8, native)"


def _run(drives: Iterable[float], control: EffortControl, *, is_free: bool = True) -> list[EffortControl]:
    controls = []
    for drive in drives:
        control = follow(control, drive, drive, is_free=is_free)
        controls.append(control)
    return controls


def _settled() -> EffortControl:
    """Has seen a usual drive of 0.5 +- 0.01."""
    return _run([0.5 + (0.01 if i % 2 else -0.01) for i in range(64)], EffortControl(), is_free=False)[-1]


def test_a_prompt_teaches_what_is_usual_and_changes_nothing() -> None:
    wild = [0.1, 0.9] * 40
    assert {control.effort for control in _run(wild, EffortControl(), is_free=False)} == {"focus"}


def test_usual_tokens_keep_the_native_effort() -> None:
    drives = [0.5 + (0.01 if i % 2 else -0.01) for i in range(64)]
    assert {control.effort for control in _run(drives, _settled())} == {"focus"}


@pytest.mark.parametrize(("drive", "effort"), [(0.54, "crisis"), (0.46, "wake")])
def test_lasting_change_changes_the_effort(drive: float, effort: Effort) -> None:
    assert effort in {control.effort for control in _run([drive] * 6, _settled())}


def test_nothing_changes_before_enough_was_seen() -> None:
    drives = [0.5, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9]
    assert len(drives) == LEARN_TOKENS
    assert {control.effort for control in _run(drives, EffortControl())} == {"focus"}


def test_what_has_begun_lasts_until_the_level_is_well_back() -> None:
    high = next(c for c in _run([0.54] * 6, _settled()) if c.effort == "crisis")
    after = _run([high.usual] * 12, high)
    lasting = [control for control in after if control.effort == "crisis"]
    assert any(control.level < 0.75 for control in lasting), "left at the level at which it began"
    assert after[-1].effort == "focus"
