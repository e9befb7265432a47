"""The picture of a service that is watched: 80 columns, any height, nobody's control characters."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from gateway.operations.watch_state import WatchState, answered, unanswered
from gateway.operations.watch_view import decision_line, render_watch, watch_line
from tests.gateway.made_up_status import MIB, decision, made_up_status


def _seen(
    status: dict[str, Any], *, width: int = 80, height: int = 40, state: WatchState | None = None
) -> str:
    state = state or answered(WatchState(), status, 0.0, "")
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False)
    console.print(render_watch(state, "http://127.0.0.1:8000", height, 5.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_is_seen_in_80_columns() -> None:
    status = made_up_status(num_actors=4)
    status["actors"][3]["state"] = "starting"
    status["cluster"] = {
        "pending": [{"name": "experts-1-5", "memory_bytes": 14 * MIB}],
        "decisions": [decision(second) for second in range(20)],
    }
    seen = _seen(status)
    lines = seen.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 40
    for text in (
        "stories at http://127.0.0.1:8000  WAKE (4 experts a layer)",
        "2 running, 1 waiting",
        "3 open",
        "lfu 83 lru 80 trust 73",
        "experts-1 2/2 (192)",
        "starting",
        "waits for a machine with 14.0 MiB: experts-1-5",
        "10:00:19 spawn experts-19: nobody answers",
    ):
        assert text in seen
    assert "…" not in seen


def test_node_has_the_bytes_of_all_its_processes() -> None:
    rows = {
        line.split()[0]: line.split()
        for line in _seen(made_up_status(num_actors=3)).splitlines()
        if line.strip()
    }
    assert rows["node0"][5:] == ["1", "5.0"]
    assert rows["node1"][5:] == ["2", "26.0", "80.0"]
    assert rows["node2"][5:] == ["1", "13.0", "40.0"]


@pytest.mark.parametrize("height", [24, 30, 50])
def test_large_service_fits_the_terminal_and_says_what_is_left_out(height: int) -> None:
    status = made_up_status(num_actors=64)
    status["nodes"] = [status["nodes"][0] | {"node": f"node{index}"} for index in range(40)]
    status["cluster"]["pending"] = [{"name": f"p{index}", "memory_bytes": MIB} for index in range(9)]
    status["cluster"]["decisions"] = [decision(second, reason="why " * 60) for second in range(20)]
    if height < 36:  # higher ones show reasons whole
        assert len(_seen(status, height=height).splitlines()) <= height
    assert "more" in _seen(status, height=height)


def test_lost_service_is_said_to_be_lost_and_its_last_numbers_stay() -> None:
    state = unanswered(answered(WatchState(), made_up_status(), 0.0, ""), "refused", 2.0, "10:00:02Z")
    seen = " ".join(_seen({}, state=state).split())
    assert "no answer for 3 s: all below is 5 s old" in seen
    assert "experts-0" in seen
    assert "10:00:02Z the service does not answer: refused" in seen
    assert watch_line(state, "10:00:05Z") == "10:00:05Z no answer: refused"


def test_texts_of_a_service_move_no_cursor_and_set_no_style() -> None:
    status = made_up_status()
    status["model"] = "\x1b[2Jstories"
    status["actors"][0]["name"] = "[red]bold[/red]\n"
    status["cluster"]["decisions"] = [decision(1, reason="\x07[/]")]
    seen = _seen(status)
    assert "\x1b" not in seen and "\x07" not in seen
    assert "[red]bold" in seen


def test_line_has_the_numbers_of_the_service() -> None:
    state = answered(WatchState(), made_up_status(num_tokens=100), 10.0, "")
    state = answered(state, made_up_status(num_tokens=160), 11.0, "")
    assert watch_line(state, "10:00:01Z") == (
        "10:00:01Z wake running=2 waiting=1 tokens_per_s=60.0 prompt_tokens_per_s=12.0 routers=1/1 actors=2/2 "
        "nodes=3 resident=31.0MiB hits=90% pending=0"
    )


def test_decision_s_line_has_its_reason() -> None:
    assert decision_line(decision(3, "drain", "idle")) == "2026-01-01T10:00:03Z drain experts-3: idle"


def test_node_whose_actors_were_wrong_is_said_to_have_some() -> None:
    status = made_up_status()
    status["cluster"]["quarantines"] = {"node2": 2}
    assert "10.0.0.3  alive, 2 quarantined" in _seen(status)
