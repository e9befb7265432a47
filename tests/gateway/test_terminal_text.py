"""What reaches a terminal of what models and servers wrote."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gateway.operations.status_view import render_status
from gateway.text.terminal_text import safe_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two lines\n\tand a tab", "two lines\n\tand a tab"),
        ("日本 é 👩\u200d🚀 a\u00a0b\u3000c", "日本 é 👩\u200d🚀 a\u00a0b\u3000c"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten\r\n", "overwritten\n"),
        ("\x9b31m\x08\x00\x7f", "\\x9b31m\\x08\\x00\\x7f"),
        ("\u202egpj.exe\u2066", "\\u202egpj.exe\\u2066"),
        ("a\u2028b\ufeff", "a\\u2028b\\ufeff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_text_is_shown_without_what_steers_a_terminal(text: str, shown: str) -> None:
    assert safe_text(text) == shown


@given(st.text(), st.integers(0, 50))
def test_any_text_is_safe_and_the_same_in_pieces(text: str, at: int) -> None:
    shown = safe_text(text)
    assert shown == safe_text(text[:at]) + safe_text(text[at:])
    controls = {character for character in shown if unicodedata.category(character) == "Cc"}
    assert controls <= {"\n", "\t"}


@pytest.mark.parametrize("is_kept", [False, True])
def test_status_says_what_is_learned_and_will_be_forgotten(is_kept: bool) -> None:
    router = {
        "pid": 1,
        "numerics_class": "c",
        "backbone_bytes": 1,
        "kv_bytes": 1,
        "experts": {"resident_bytes": 1},
    }
    router |= {"trust": {"is_kept": is_kept}, "stand_ins": {"is_kept": True}}
    router["prefix_cache"] = {"bytes": 2**20, "hit_tokens": 1234} if is_kept else None
    router["media"] = {"tower_bytes": 3 * 2**20 * is_kept, "kept_bytes": 2**20, "encoded": 2, "found": 1}
    router["speech"] = {
        "is_loaded": is_kept,
        "resident_bytes": 5 * 2**20,
        "running": 2,
        "waiting": 1,
        "samples": 96_000,
    }
    status = {"model": "m", "router": router, "routers": [], "actors": [], "nodes": []}
    status |= {"requests": {"running": 0, "waiting": 0}}
    console = Console(width=400, highlight=False)
    with console.capture() as capture:
        console.print(render_status(status))
    assert ("Trust is learned but not kept" in capture.get()) == (not is_kept)
    assert ("1.0 MiB of it kept for prompts that begin alike, 1,234 tokens found" in capture.get()) == is_kept
    assert ("images and sound 4.0 MiB (2 encoded, 1 found encoded)" in capture.get()) == is_kept
    assert ("speech 5.0 MiB (2 running, 1 waiting, 4 s spoken)" in capture.get()) == is_kept
    assert "Stand-ins" not in capture.get()


def test_status_of_a_hostile_service_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J[red]x[/red]"
    actor = {"name": evil, "pid": 1, "node": evil, "group": 2, "state": evil}
    actor |= {"hit_rates": {"trust": 0.834, "lfu": 0.8, evil: 0.731}}
    actor |= {
        "store": {
            "records_done": 1,
            "records_total": 2,
            "bytes_done": 2**20,
            "bytes_total": 2**21,
            "last_error": evil,
        }
    }
    router = {"pid": 1, "numerics_class": evil, "backbone_bytes": 1}
    router |= {"experts": {"resident_bytes": 1, "prefetched": 1200, "prefetched_used": 900}}
    status = {
        "model": evil,
        "router": router | {"kv_bytes": 1},
        "routers": [router | {"name": evil, "state": evil, "node": evil}, {"name": evil, "state": "lost"}],
        "actors": [actor],
        "nodes": [{"node": evil, "address": evil, "state": evil, "cpus": 1.0, "gpus": 0.0}],
        "requests": {"running": 0, "waiting": 0},
    }
    console = Console(width=250, force_terminal=True, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(render_status(status))
    assert "\x1b[2J" not in capture.get()
    assert capture.get().count("\\x1b[2J[red]x[/red]") == 15
    assert "fetches its group: 1 of 2 experts, 1.0 MiB of 2.0 MiB; " in capture.get()
    assert "trust 83%, lfu 80%, " in capture.get()
    assert "Prefetched 1,200 experts, 75% used" in capture.get()
