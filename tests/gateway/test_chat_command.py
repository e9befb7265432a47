"""The terminal chat: its loop without a terminal, against a service and a store, and once in a real terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.chat.command import speech_fields
from gateway.chat.local import open_store
from gateway.chat.loop import ChatBackend, Conversation, Piece, Turn, run_chat
from gateway.chat.remote import RemoteChat, connect
from gateway.chat.sound_folder import SoundFolder
from gateway.errors import ChatFailed, GenerationFailed
from gateway.http.api_keys import KeyRing
from gateway.local.speech import SpeechChoice
from gateway.media.decoder import MediaDecoder
from gateway.media.wav_file import decode_wav
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions, LoadedEngine
from router.speech.wish import NUM_CODES
from tests.gateway.fake_router import FakeRouter, Step, app_over, script, speech_facts, stories_tokenizer
from tests.gateway.media.files import image_file, picture, tones, wav_file
from tests.omni import AFTER_QUESTION, BEFORE_QUESTION, Published, request

USER: list[Turn] = [{"role": "user", "content": "hello"}]


class ScriptedTerminal:
    """Types lines; an exception among them is raised in the place of a line."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = list(lines)
        self.shown: list[str] = []
        self.notes: list[str] = []

    def read_line(self) -> str:
        line = self._lines.pop(0) if self._lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def show(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


class ScriptedBackend:
    """Answers each question with the same pieces; an exception among them is raised there."""

    model = "scripted"

    def __init__(self, *pieces: Piece | BaseException) -> None:
        self._pieces = pieces
        self.asked: list[list[Turn]] = []
        self.num_closed = 0

    def stream(self, messages: list[Turn]) -> Generator[Piece, None, None]:
        self.asked.append(list(messages))
        try:
            for piece in self._pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.num_closed += 1


def _chat(backend: ChatBackend, *lines: str | BaseException) -> tuple[ScriptedTerminal, Conversation]:
    terminal, conversation = ScriptedTerminal(*lines), Conversation()
    ticks = iter(range(1000))
    run_chat(backend, terminal, conversation, lambda: next(ticks) / 10)
    return terminal, conversation


def test_answers_are_shown_as_they_come_and_remembered() -> None:
    backend = ScriptedBackend(Piece("Good ", 2), Piece("day", 3))
    terminal, conversation = _chat(backend, "hello", "", "  ", "again", "/quit", "unread")
    assert terminal.shown == ["Good ", "day", "\n"] * 2
    assert terminal.notes == ["[3 tokens, first after 100 ms, 20.0 tokens/s]"] * 2
    assert backend.asked[1] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "again"},
    ]
    assert len(conversation.turns) == 4


def test_interrupt_stops_the_answer_and_keeps_what_came_of_it() -> None:
    backend = ScriptedBackend(Piece("Once", 1), KeyboardInterrupt())
    terminal, conversation = _chat(backend, "hello", KeyboardInterrupt(), "more")
    assert terminal.notes[0] == "[stopped; 1 tokens, first after 100 ms]"
    assert terminal.notes[1] == "/quit or Ctrl-D ends the chat"
    assert conversation.turns[1] == {"role": "assistant", "content": "Once"}
    assert (len(backend.asked), backend.num_closed) == (2, 2)


def test_failed_question_is_forgotten_so_that_it_can_be_asked_again() -> None:
    backend = ScriptedBackend(ChatFailed("the service said \x1b[2J"))
    terminal, conversation = _chat(backend, "hello")
    assert terminal.notes == ["[error: the service said \x1b[2J; no answer]"]
    assert conversation.turns == []


def test_commands_change_what_is_sent(tmp_path: Path) -> None:
    backend = ScriptedBackend(Piece("A", 1))
    lines = ("/system be brief", "one", "/reset", "//two", f"/save {tmp_path / 'c.json'}", "/system", "three")
    terminal, _ = _chat(
        backend, *lines, f"/save {tmp_path / 'c.json'}", "/save", "/save /no/such/x", "/nope", "/help"
    )
    system = {"role": "system", "content": "be brief"}
    assert backend.asked[0] == [system, {"role": "user", "content": "one"}]
    assert backend.asked[1] == [system, {"role": "user", "content": "/two"}]
    assert [message["role"] for message in backend.asked[2]] == ["user", "assistant", "user"]
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved == {
        "model": "scripted",
        "messages": [*backend.asked[1], {"role": "assistant", "content": "A"}],
    }
    assert (tmp_path / "c.json").stat().st_mode & 0o077 == 0
    for note, expected in zip(
        terminal.notes[-5:],
        ("exists already", "name a file", "cannot be written", "/nope is no command", "/system TEXT"),
        strict=True,
    ):
        assert expected in note


def test_files_go_with_the_next_message_that_is_answered(tmp_path: Path) -> None:
    (tmp_path / "seen.png").write_bytes(image_file(picture(8, 8)))
    (tmp_path / "heard.wav").write_bytes(wav_file(tones(0.2, 16_000), 16_000))
    seen, heard = f"/image {tmp_path / 'seen.png'}", f"/audio {tmp_path / 'heard.wav'}"
    failing = ScriptedBackend(ChatFailed("busy"))
    terminal, conversation = _chat(failing, seen, heard, "what?", "again?")
    assert terminal.notes[0].endswith("seen.png goes with the next message")
    assert [part["type"] for part in failing.asked[1][0]["content"]] == ["image_url", "input_audio", "text"]
    assert failing.asked[1][0]["content"][2] == {"type": "text", "text": "again?"}
    answering = ScriptedBackend(Piece("A", 1))
    run_chat(answering, ScriptedTerminal("what?", "why?"), conversation)
    assert len(answering.asked[0][0]["content"]) == 3
    assert answering.asked[1][2] == {"role": "user", "content": "why?"}
    assert not conversation.attached


def test_file_that_is_refused_can_be_taken_back(tmp_path: Path) -> None:
    (tmp_path / "seen.png").write_bytes(image_file(picture(8, 8)))
    backend = ScriptedBackend(ChatFailed("messages.0.content.0 is a damaged image"))
    terminal, conversation = _chat(backend, f"/image {tmp_path / 'seen.png'}", "what?", "/image")
    assert terminal.notes[-1] == "no file goes with the next message"
    assert not conversation.attached


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/image /no/such.png", "/no/such.png cannot be read: No such file"),
        ("/audio a\0b", "cannot be read: no such path"),
        (f"/image {__file__}", "is no PNG, JPEG or WebP image"),
        (f"/audio {__file__}", "is no WAV file"),
    ],
)
def test_files_that_cannot_be_sent_are_told(line: str, note: str) -> None:
    terminal, conversation = _chat(ScriptedBackend(), line)
    assert note in terminal.notes[0]
    assert not conversation.attached


def test_chat_with_a_store_sees_and_hears(
    omni_store: Path, omni: LoadedEngine, published: Published, tmp_path: Path
) -> None:
    content = image_file(picture(40, 24))
    (tmp_path / "seen.png").write_bytes(content)
    options = EngineOptions(dtype="float32", has_media=True)
    with open_store(omni_store, "omni", {"max_tokens": 6, "temperature": 0.0}, options) as backend:
        _, conversation = _chat(backend, f"/image {tmp_path / 'seen.png'}", "What?")
        (tmp_path / "seen.png").write_bytes(b"RIFF no image")
        refused, _ = _chat(backend, f"/image {tmp_path / 'seen.png'}", "What?")
    assert omni.media is not None
    medium = MediaDecoder(omni.media.facts).image(content)
    asked = request(omni, BEFORE_QUESTION, medium, (*b"What?", *AFTER_QUESTION), max_tokens=6)
    text = TextTokenizer.from_folder(omni_store).decode(published.greedy(asked))
    assert conversation.turns[1]["content"] == text
    assert "no image of a known format" in refused.notes[1]


def test_answers_that_are_heard_are_left_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "0041.wav").write_bytes(b"an earlier chat's")
    folder = SoundFolder(tmp_path)
    backend = ScriptedBackend(Piece("Good day", 2), Piece("", samples=b"ab"), Piece("", 2, b"cd"))
    terminal = ScriptedTerminal("hello", "again")
    run_chat(backend, terminal, Conversation(), sounds=folder)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0041.wav", "0042.wav", "0043.wav"]
    assert decode_wav((tmp_path / "0042.wav").read_bytes(), 1.0)[1] == 24_000
    assert (tmp_path / "0042.wav").read_bytes().endswith(b"abcd")
    assert terminal.notes[1] == f"[0.0 s of speech in {tmp_path / '0042.wav'}]"
    assert backend.asked[1][1] == {"role": "assistant", "content": "Good day"}


def test_chats_that_share_a_folder_write_over_nothing(tmp_path: Path) -> None:
    one, other = SoundFolder(tmp_path), SoundFolder(tmp_path)
    assert "0001.wav" in one.save(b"ab") and "0002.wav" in other.save(b"cd") and "0003.wav" in one.save(b"ef")
    assert [file.read_bytes()[-2:] for file in sorted(tmp_path.iterdir())] == [b"ab", b"cd", b"ef"]


def test_speech_that_was_stopped_or_failed_is_left_as_far_as_it_came(tmp_path: Path) -> None:
    for number, ending in enumerate((KeyboardInterrupt(), ChatFailed("busy")), 1):
        backend = ScriptedBackend(Piece("Good day", 2), Piece("", samples=b"abcd"), ending)
        terminal = ScriptedTerminal("hello")
        conversation = Conversation()
        run_chat(backend, terminal, conversation, sounds=SoundFolder(tmp_path))
        assert (tmp_path / f"{number:04}.wav").read_bytes().endswith(b"abcd")
        assert conversation.turns[1]["content"] == "Good day"


def test_folder_that_cannot_be_written_to_ends_no_chat(tmp_path: Path) -> None:
    folder = SoundFolder(tmp_path / "sounds")
    (tmp_path / "sounds").rmdir()
    terminal = ScriptedTerminal("hello", "again")
    run_chat(ScriptedBackend(Piece("A", 1, b"ab")), terminal, Conversation(), sounds=folder)
    assert "cannot be written" in terminal.notes[1]
    assert len(terminal.notes) == 4


def test_tokens_that_nobody_counted_are_not_made_up() -> None:
    terminal, _ = _chat(ScriptedBackend(Piece("a"), Piece("b")), "hello")
    assert terminal.notes == ["[tokens unknown, first after 100 ms]"]


class _AppTransport(httpx.BaseTransport):
    """The gateway's app behind a blocking client."""

    def __init__(self, app: Any) -> None:
        self._transport = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def run() -> tuple[httpx.Response, bytes]:
            response = await self._transport.handle_async_request(
                httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            )
            return response, b"".join([chunk async for chunk in response.aiter_raw()])

        response, body = asyncio.run(run())
        return httpx.Response(response.status_code, headers=response.headers, content=body)


def _remote(router: FakeRouter, key: str | None = "k", **sampling: Any) -> Any:
    app = app_over(router, keys=KeyRing.of(["k"]))
    return connect("http://gateway/v1/", key, None, sampling, _AppTransport(app))


def test_chat_with_a_service_sends_key_and_sampling_and_counts_its_tokens() -> None:
    ids = stories_tokenizer().encode("A king\u2028and a queen.")
    router = FakeRouter(script(ids))
    with _remote(router, max_tokens=20, seed=3) as backend:
        assert backend.model == "stories"
        pieces = list(backend.stream(USER))
    assert "".join(piece.text for piece in pieces) == "A king\u2028and a queen."
    assert pieces[-1].num_tokens == len(ids) + 1
    assert (router.requests[0].sampling.max_tokens, router.requests[0].sampling.seed) == (20, 3)


def test_chat_with_a_service_hears_and_counts_the_text_alone() -> None:
    ids = stories_tokenizer().encode("A king.")
    codes = tuple(range(NUM_CODES))
    router = FakeRouter(script(ids), [Step(codes, samples=b"ab"), Step((), "stop", samples=b"cd")])
    fields = speech_fields(SpeechChoice("Chelsie", 5))
    app = app_over(router, speech=speech_facts())
    with connect("http://gateway", None, None, fields, _AppTransport(app)) as backend:
        pieces = list(backend.stream([{"role": "user", "content": "Once upon a time"}]))
    assert "".join(piece.text for piece in pieces) == "A king."
    assert b"".join(piece.samples for piece in pieces) == b"abcd"
    assert pieces[-1].num_tokens == len(ids) + 1
    wish = router.requests[1].speech
    assert wish is not None and wish.voice == "chelsie"
    assert router.requests[1].sampling.max_tokens == 5


def test_service_that_wants_another_key_says_so() -> None:
    with pytest.raises(ChatFailed, match="Incorrect API key"), _remote(FakeRouter(), "wrong"):
        pass


@pytest.mark.parametrize(
    ("ending", "message"),
    [(Step((), "error", "no memory"), "no memory"), (Step(raises=ValueError("x")), "Internal error")],
)
def test_answer_that_ends_with_an_error_is_told(ending: Step, message: str) -> None:
    router = FakeRouter([Step((5,)), ending])
    with _remote(router) as backend, pytest.raises(ChatFailed, match=message):
        list(backend.stream(USER))


@pytest.mark.parametrize(
    "content",
    [
        b"data: {}\n\ndata: [DONE]\n",
        b"data: nothing\n",
        b"data: []\n",
        b'data: {"choices": [{"delta": 3}]}\n',
        b'data: {"error": 3}\n',
        b'data: {"choices": []}\n\n',
        b"\xff" * (5 * 1024 * 1024),
    ],
)
def test_answer_of_something_else_is_refused_in_one_line(content: bytes) -> None:
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content))
    client = httpx.Client(transport=transport, base_url="http://gateway")
    with client, pytest.raises(ChatFailed) as caught:
        list(RemoteChat(client, "m").stream(USER))
    assert "\n" not in str(caught.value)


def test_nothing_in_place_of_a_text_or_a_sound_is_none() -> None:
    nothing: dict[str, object] = {"content": None, "audio": {"transcript": None, "data": None}}
    deltas = ({"audio": None}, nothing, {"audio": {"transcript": "Hi", "data": None}})
    lines = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    content = "".join((*lines, "data: [DONE]\n\n")).encode()
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content))
    with httpx.Client(transport=transport, base_url="http://gateway") as client:
        pieces = list(RemoteChat(client, "m").stream(USER))
    assert "".join(piece.text for piece in pieces) == "Hi" and not any(piece.samples for piece in pieces)


def test_address_without_a_service_is_one_line(free_port: int) -> None:
    for url in (f"http://127.0.0.1:{free_port}", "http://[", "http://"):
        with pytest.raises(ChatFailed, match="no answer from the service"), connect(url, None, None, {}):
            pass


def test_chat_with_a_store_stops_and_goes_on(stories_store: Path) -> None:
    sampling = {"max_tokens": 12, "temperature": 0.0}
    with open_store(stories_store, "stories", sampling, EngineOptions()) as backend:
        whole = [*backend.stream(USER)]
        assert whole[-1].num_tokens == 12
        stopped = backend.stream(USER)
        next(stopped)
        stopped.close()
        again = [*backend.stream(USER)]
        assert "".join(piece.text for piece in again) == "".join(piece.text for piece in whole)
        with pytest.raises(ChatFailed, match="/reset begins anew"):
            list(backend.stream([{"role": "user", "content": "word " * 3000}]))


def test_engine_s_failure_is_told(stories_store: Path) -> None:
    with open_store(stories_store, "stories", {"max_tokens": 4}, EngineOptions()) as backend:

        def fail() -> Any:
            raise ZeroDivisionError

        backend._thread.engine.step = fail  # type: ignore[method-assign]
        with pytest.raises(GenerationFailed, match="the engine failed"):
            list(backend.stream(USER))
        with pytest.raises(ChatFailed):
            list(backend.stream(USER))


class _Screen:
    """The master's end of a pseudo-terminal with the command at the other."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=_take_terminal,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, is_there: Callable[[str], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_there(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self._master], [], [], 0.2)[0]:
                self.text += os.read(self._master, 65536).decode()

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self._master, text.encode())

    def interrupt_until(self, is_there: Callable[[str], bool], timeout_s: float = 60.0) -> None:
        """Press Ctrl-C, again each second, until `is_there`.

        Python's readline shows its prompt before it waits in select(): an interrupt between the two is seen
        at the next key only, so one press is not enough to rely on.
        """
        self.text = ""
        deadline = time.monotonic() + timeout_s
        while True:
            os.write(self._master, b"\x03")
            try:
                return self.wait_for(is_there, 1.0)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    """In the child: a session of its own whose terminal this is, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def _screen(*arguments: str) -> Iterator[_Screen]:
    screen = _Screen(*arguments)
    try:
        yield screen
    finally:
        screen.close()


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(stories_store: Path) -> None:
    with _screen(str(stories_store), "--max-tokens", "1500", "--seed", "1") as screen:
        screen.wait_for(lambda text: text.endswith("> "))
        screen.interrupt_until(lambda text: "/quit or Ctrl-D" in text and text.endswith("> "))
        screen.type("Once upon a time\r")
        screen.wait_for(lambda text: len(text) > 60)
        screen.interrupt_until(lambda text: "[stopped; " in text and text.endswith("> "))
        assert "tokens/s]" in screen.text
        screen.type("/quit no\x15/reset\r")  # Ctrl-U: lines can be edited
        screen.wait_for(lambda text: "begins anew" in text and text.endswith("> "))
        screen.type("\x04")
        assert screen.process.wait(30) == 0


def test_in_a_terminal_a_hostile_service_cannot_steer_it() -> None:
    evil = "\x1b]0;owned\x07\x9b2Jhi\u202e"

    def answer(connection: Any) -> None:
        with connection:
            request = connection.recv(65536)
            if b"/v1/models" in request:
                body = json.dumps({"data": [{"id": evil}]}).encode()
            else:
                chunk = {"choices": [{"delta": {"content": evil}}]}
                body = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps({'error': {'message': evil}})}\n\n".encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)

    def serve() -> None:
        for _ in range(2):
            answer(listener.accept()[0])

    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with _screen(f"http://127.0.0.1:{listener.getsockname()[1]}") as screen:
            screen.wait_for(lambda text: text.endswith("> "))
            seen = screen.text
            screen.type("hello\r")
            screen.wait_for(lambda text: "[error: " in text and text.endswith("> "))
            seen += screen.text
            screen.process.send_signal(signal.SIGHUP)
        thread.join()
    assert seen.count("\\x1b]0;owned\\x07\\x9b2Jhi\\u202e") == 3
    assert "\x1b]0;" not in seen and "\x9b" not in seen and "\u202e" not in seen
