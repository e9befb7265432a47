"""The conversation of `sage-moe chat`: reads lines, carries out commands, shows answers as they come.

Knows neither the terminal nor where answers come from: both are protocols. Ctrl-C arrives as KeyboardInterrupt; it
ends an answer, never the loop.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.chat.attachment import read_audio, read_image
from gateway.errors import ChatFailed, GatewayError

HELP = (
    "/system TEXT sets the system message (alone: removes it), /image FILE and /audio FILE go with the next message "
    "(alone: no file does), /reset begins anew, /save FILE writes the conversation as JSON, /quit or Ctrl-D ends; "
    "Ctrl-C stops an answer; //text sends /text"
)


Turn = dict[str, Any]
"""A message as OpenAI's API has it: role, and content as text or parts."""


@dataclass(frozen=True)
class Piece:
    """Some of an answer's text, maybe none, and how many tokens the answer has so far, where that is known; some of how
    it sounds, where it is spoken."""

    text: str
    num_tokens: int | None = None
    samples: bytes = b""


class ChatBackend(Protocol):
    """Where answers come from."""

    @property
    def model(self) -> str: ...

    def stream(self, messages: list[Turn]) -> Generator[Piece, None, None]:
        """One answer. Closing the generator ends the work on it. Raises GatewayError."""


class SoundKeeper(Protocol):
    """Where answers that are spoken go."""

    def save(self, samples: bytes) -> str:
        """Of one answer. Returns what to tell."""


class Terminal(Protocol):
    """What a person types and sees."""

    def read_line(self) -> str:
        """Raises EOFError at the end of the input and KeyboardInterrupt on Ctrl-C."""

    def show(self, text: str) -> None:
        """Some of an answer, at once. The text comes from a model."""

    def note(self, text: str) -> None:
        """A line about the chat itself. May quote what others wrote."""


@dataclass
class Conversation:
    """What is sent: the system message, if there is one, and the turns."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    attached: list[dict[str, Any]] = field(default_factory=list)
    """Images and sound for the next turn."""

    def ask(self, text: str) -> None:
        """A turn with what is attached, which stays until it is answered."""
        parts = [*self.attached, {"type": "text", "text": text}]
        self.turns.append({"role": "user", "content": parts if self.attached else text})

    def messages(self) -> list[Turn]:
        system: list[Turn] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]


@dataclass
class AnswerClock:
    """When the pieces of an answer came, in seconds of the loop's clock."""

    asked_at: float
    first_at: float | None = None
    last_at: float = 0.0
    num_tokens: int | None = None

    def note(self, piece: Piece, now: float) -> None:
        if piece.text:
            self.first_at = now if self.first_at is None else self.first_at
            self.last_at = now
        if piece.num_tokens is not None:
            self.num_tokens = piece.num_tokens

    def summary(self) -> str:
        """Tokens, time to the first one, and tokens per second after it."""
        if self.first_at is None:
            return "no answer"
        tokens = "tokens unknown" if self.num_tokens is None else f"{self.num_tokens} tokens"
        parts = [tokens, f"first after {(self.first_at - self.asked_at) * 1000:.0f} ms"]
        elapsed = self.last_at - self.first_at
        if self.num_tokens is not None and self.num_tokens > 1 and elapsed > 0:
            parts.append(f"{(self.num_tokens - 1) / elapsed:.1f} tokens/s")
        return ", ".join(parts)


def run_chat(
    backend: ChatBackend,
    terminal: Terminal,
    conversation: Conversation,
    clock: Callable[[], float] = time.perf_counter,
    sounds: SoundKeeper | None = None,
) -> None:
    """Until the input ends or the user quits. sounds: of a backend whose answers are spoken."""
    while True:
        try:
            line = terminal.read_line()
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.note("/quit or Ctrl-D ends the chat")
            continue
        if line.startswith("/") and not line.startswith("//"):
            if line.split()[0] == "/quit":
                return
            _carry_out(line, backend.model, terminal, conversation)
        elif line.strip():
            text = line[1:] if line.startswith("//") else line
            samples = _answer(text, backend, terminal, conversation, clock)
            if samples and sounds is not None:
                terminal.note(sounds.save(samples))


def _answer(
    text: str,
    backend: ChatBackend,
    terminal: Terminal,
    conversation: Conversation,
    clock: Callable[[], float],
) -> bytes:
    """Add the question and what comes of its answer. An answer that was stopped stays, as far as it came; a question
    without any answer goes, so that it can be asked again. Returns what was heard of it."""
    conversation.ask(text)
    timing = AnswerClock(clock())
    pieces: list[str] = []
    samples = bytearray()
    ending = ""
    try:
        with closing(backend.stream(conversation.messages())) as stream:
            for piece in stream:
                timing.note(piece, clock())
                pieces.append(piece.text)
                samples += piece.samples
                terminal.show(piece.text)
    except KeyboardInterrupt:
        ending = "stopped; "
    except GatewayError as error:
        ending = f"error: {error}; "
    if any(pieces):
        terminal.show("\n")
        conversation.turns.append({"role": "assistant", "content": "".join(pieces)})
        conversation.attached.clear()
    else:
        conversation.turns.pop()
    terminal.note(f"[{ending}{timing.summary()}]")
    return bytes(samples)


def _carry_out(line: str, model: str, terminal: Terminal, conversation: Conversation) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/reset":
        conversation.turns.clear()
        conversation.attached.clear()
        terminal.note("the conversation begins anew")
    elif command == "/system":
        conversation.system = argument or None
        terminal.note("the system message is set" if argument else "there is no system message")
    elif command == "/save":
        terminal.note(_save(argument, model, conversation))
    elif command in ("/image", "/audio"):
        terminal.note(_attach(command, argument, conversation))
    elif command == "/help":
        terminal.note(HELP)
    else:
        terminal.note(f"{command} is no command; /help lists them")


def _attach(command: str, path: str, conversation: Conversation) -> str:
    """Returns what to tell."""
    if not path:
        conversation.attached.clear()  # a file that is refused would be sent again and again
        return "no file goes with the next message"
    try:
        conversation.attached.append(read_image(path) if command == "/image" else read_audio(path))
    except ChatFailed as error:
        return str(error)
    return f"{path} goes with the next message"


def _save(path: str, model: str, conversation: Conversation) -> str:
    """Write a new file, which only its owner can read. Returns what to tell."""
    if not path:
        return "name a file: /save FILE"
    content = {"model": model, "messages": conversation.messages()}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    except FileExistsError:
        return f"{path} exists already; choose another name"
    except (OSError, ValueError) as error:
        return f"{path} cannot be written: {getattr(error, 'strerror', None) or 'no such path'}"
    return f"saved to {path}"
