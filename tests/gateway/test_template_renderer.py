"""Templates that take too much: the process that renders them ends, the gateway goes on."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import PreparationBusy, TemplateStuck, to_api_error
from gateway.text.confined_process import LENGTH
from gateway.text.template_renderer import RenderLimits, TemplateRenderer

LIMITS = RenderLimits(timeout_s=0.8, max_memory_bytes=256 * 1024 * 1024, max_chars=100_000)
NEVER_LONGER_S = 30.0
"""For a rendering that is to take 0.8 s, on a machine that may be busy: it would otherwise take hours."""
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3

Start = Callable[..., TemplateRenderer]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[TemplateRenderer] = []

    def run(**sources: str) -> TemplateRenderer:
        started.append(TemplateRenderer(sources, LIMITS))
        assert started[-1].compile() == {}
        return started[-1]

    yield run
    for renderer in started:
        renderer.close()


def _process_id(renderer: TemplateRenderer) -> int:
    assert renderer.confined.process is not None
    return renderer.confined.process.pid


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "hostile",
    [
        LOOP,
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(200) }}",
        "{{ n ** (n ** 12) }}",
        "{% set ns = namespace(s='x' * 1000) %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ (x * (10 ** 9)) | length }}",
        "{{ '%0999999999d' % n }}",
        "{{ [x] * (10 ** 9) }}",
        "{{ (n ** (10 ** 8)) | string }}",
        "{{ (x ~ 'a') * 50000000 }}",
    ],
)
def test_hostile_template_ends_in_time_and_the_next_rendering_works(start: Start, hostile: str) -> None:
    renderer = start(hostile=hostile, kind="hello {{ x }}")
    began = time.monotonic()
    with contextlib.suppress(TemplateStuck):
        assert "text" not in renderer.render("hostile", {"x": "y", "n": 7})
    assert time.monotonic() - began < NEVER_LONGER_S
    assert renderer.render("kind", {"x": "y"}) == {"text": "hello y"}


@pytest.mark.parametrize(
    "hostile", ["{{ 'x' * (10 ** 10) }}", "{{ 9 ** (9 ** 9) }}", "{{ 'x' * (3 ** 17) * (3 ** 17) }}"]
)
def test_constant_expression_is_not_evaluated_outside_either(hostile: str) -> None:
    """Jinja computes constants while it compiles."""
    renderer = TemplateRenderer({"hostile": hostile}, LIMITS)
    began = time.monotonic()
    with contextlib.suppress(TemplateStuck):
        failures = renderer.compile()
        assert failures or "text" not in renderer.render("hostile", {})
    assert time.monotonic() - began < NEVER_LONGER_S
    renderer.close()


def test_process_ends_itself_when_nobody_waits_for_it(start: Start) -> None:
    """As after the death of the gateway in the middle of a rendering."""
    renderer = start(loop=LOOP)
    process, peer = renderer.confined.process, renderer.confined.peer
    assert process is not None and peer is not None
    request = json.dumps({"name": "loop", "variables": {}}).encode()
    peer.sendall(LENGTH.pack(len(request)) + request)
    assert process.wait(NEVER_LONGER_S) == -signal.SIGALRM


def test_idle_process_ends_with_its_owner() -> None:
    renderer = TemplateRenderer({"a": "b"}, LIMITS)
    renderer.compile()
    pid = _process_id(renderer)
    del renderer
    gc.collect()
    assert not _is_alive(pid)


def test_process_that_was_killed_is_replaced(start: Start) -> None:
    """By somebody else, which no template is to blame for."""
    renderer = start(a="{{ x }}")
    number = _process_id(renderer)
    os.kill(number, signal.SIGKILL)
    os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
    assert renderer.render("a", {"x": 1}) == {"text": "1"}


def test_process_sees_no_environment(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    renderer = start(a="b")
    assert b"A_SECRET" not in Path(f"/proc/{_process_id(renderer)}/environ").read_bytes()


def test_texts_of_any_kind_come_back_as_they_were(start: Start) -> None:
    renderer = start(a="{{ x }}")
    for text in ("", "\x00\ufdd0\n", "日本 😀", "{{ x }}", "\\u0041", "a" * 99_999):
        assert renderer.render("a", {"x": text}) == {"text": text}
    assert renderer.render("a", {"x": "a" * 100_001}) == {"problem": "long"}


def test_threads_share_one_process(start: Start) -> None:
    renderer = start(a="{{ x }}")
    renderer.confined.limits = replace(LIMITS.confinement, timeout_s=60.0)  # each waits for the others
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: renderer.render("a", {"x": i})}))
        for i in range(20)
    ]
    pid = _process_id(renderer)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: {"text": str(i)} for i in range(20)}
    assert _process_id(renderer) == pid


def test_rendering_behind_a_slow_one_is_told_to_come_again(start: Start) -> None:
    renderer = start(loop=LOOP, kind="a")
    with renderer.confined.lock, pytest.raises(PreparationBusy) as caught:
        renderer.render("kind", {})
    assert to_api_error(caught.value).status == 503
    assert renderer.render("kind", {}) == {"text": "a"}
