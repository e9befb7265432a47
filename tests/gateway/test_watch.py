"""Watching a service: in a terminal, in a pipe, through its restart, to Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gateway.errors import ServiceRefuses, ServiceUnreachable
from gateway.operations.status_command import MAX_ANSWER_BYTES, fetch_status
from gateway.operations.watch import watch
from tests.gateway.made_up_status import decision, made_up_status

REPOSITORY = Path(__file__).parent.parent.parent
URL = "http://127.0.0.1:1"


class _Answers:
    """One after another, the last one again and again; errors are raised."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def __call__(self) -> Any:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _lines(
    capsys: pytest.CaptureFixture[str], num_looks: int, *answers: Any, is_json: bool = False
) -> list[str]:
    watch(_Answers(*answers), URL, Console(file=io.StringIO()), 0.0, is_json, num_looks)
    return capsys.readouterr().out.splitlines()


def test_pipe_gets_lines_and_every_new_decision_once(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made_up_status(), made_up_status(num_tokens=200)
    first["cluster"]["decisions"] = [decision(1)]
    second["cluster"]["decisions"] = [decision(1), decision(2, "drain", "idle")]
    lines = _lines(capsys, 4, first, second)
    assert [line for line in lines if "experts-" in line] == ["2026-01-01T10:00:02Z drain experts-2: idle"]
    assert sum("running=2" in line for line in lines) == 4


def test_restart_is_said_once_and_watching_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    gone = ServiceUnreachable(URL, "refused")
    lines = _lines(capsys, 5, made_up_status(), gone, gone, made_up_status(first_pid=900))
    told = [line.split(" ", 1)[1] for line in lines]
    assert told[0].startswith("wake running=2")
    assert told[1] == "the service does not answer: refused"
    assert told[2].startswith("the service was started anew, after ")
    assert told[3].startswith("wake running=2") and len(told) == 4


def test_json_lines_are_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _lines(capsys, 3, made_up_status(), ServiceUnreachable(URL, "x"), made_up_status(), is_json=True)
    assert [json.loads(line) for line in lines] == [made_up_status(), made_up_status()]


def test_service_that_never_answered_and_one_that_wants_a_key_end_it() -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(ServiceUnreachable, match=rf"no service answers at {URL} \(refused\)"):
        watch(_Answers(ServiceUnreachable(URL, "refused")), URL, console, 0.0)
    with pytest.raises(ServiceRefuses, match="wants an API key"):
        watch(_Answers(made_up_status(), ServiceRefuses(URL)), URL, console, 0.0)


def test_interrupt_ends_it_without_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _lines(capsys, 9, made_up_status(), KeyboardInterrupt())
    assert len(lines) == 1


@contextmanager
def _service(content: bytes, status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_answer_is_fetched_and_what_is_none_is_refused() -> None:
    with _service(json.dumps(made_up_status()).encode()) as url:
        assert fetch_status(url, {}, 5.0) == made_up_status()
    for content, reason in (
        (b"{}", "what answers is no status"),
        (b"[1]", "what answers is no status"),
        (b"\xff", "what answers is no status"),
        (b"[" + b" " * MAX_ANSWER_BYTES + b"]", "its answer has no end"),
    ):
        with _service(content) as url, pytest.raises(ServiceUnreachable, match=reason):
            fetch_status(url, {}, 5.0)
    with _service(b"", 401) as url, pytest.raises(ServiceRefuses):
        fetch_status(url, {}, 5.0)
    with _service(b"", 503) as url, pytest.raises(ServiceUnreachable, match="answers 503"):
        fetch_status(url, {}, 5.0)
    with pytest.raises(ServiceUnreachable):
        fetch_status(url, {}, 5.0)


def test_terminal_gets_a_picture_and_is_left_as_it_was_on_ctrl_c() -> None:
    with _service(json.dumps(made_up_status()).encode()) as url:
        ours, theirs = pty.openpty()
        command = [
            sys.executable,
            "-m",
            "gateway.cli",
            "status",
            "--watch",
            "--interval",
            "0.2",
            url,
        ]
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "TERM": "xterm",
            "COLUMNS": "80",
            "LINES": "30",
        }
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        seen = b""
        try:
            deadline = time.monotonic() + 60.0
            while seen.count(b"experts-1") < 3 and time.monotonic() < deadline:
                seen += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            seen += _rest(ours)
            assert process.wait(30.0) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)
    enter, leave, show_cursor = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
    assert seen.count(enter) == seen.count(leave) == 1
    assert seen.rindex(show_cursor) > seen.index(enter)
    assert b"Traceback" not in seen and b"Aborted" not in seen


def _rest(terminal: int) -> bytes:
    """Until the other end is closed, which Linux tells by an error."""
    seen = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            return seen
        if not part:
            return seen
        seen += part
