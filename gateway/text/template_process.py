"""The process that renders chat templates: run as a script, with a socket as its standard input.

A template comes with the model, so nothing of it runs in a process that matters, and here it runs in Jinja's immutable
sandbox: it reaches no Python attributes. Compiling counts as running, since Jinja evaluates constant expressions then.
The kernel ends this process when a request takes too long (an alarm nobody catches, which also ends it after its parent
has gone) and refuses memory beyond a limit. Imports nothing of ours: it is started with an empty environment and path.

A message either way is 8 bytes of length and JSON. First come the limits and the templates' sources by name; the answer
is a list of those that cannot be compiled. Then requests, each answered by its text or by why there is none.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct("<Q")
MAX_SHOWN_CHARS = 500


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """As `transformers` sets it up, since templates are written for that."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, leaves `<` and `&` as they are."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def compile_all(sources: dict[str, str]) -> tuple[dict[str, jinja2.Template], dict[str, str]]:
    """The usable templates, and why the others are not."""
    made = environment()
    templates, failures = {}, {}
    for name, source in sources.items():
        try:
            templates[name] = made.from_string(source)
        except Exception as error:  # noqa: BLE001 - constant expressions can raise anything
            failures[name] = f"{type(error).__name__}: {error}"[:MAX_SHOWN_CHARS]
    return templates, failures


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """{"text": ...}, or {"refusal": the template's own words}, or {"problem": "long" or "failed"}."""
    pieces, num_chars = [], 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > max_chars:
                return {"problem": "long"}
        return {"text": "".join(pieces)}
    except TemplateRefusal as error:
        return {"refusal": str(error)[:MAX_SHOWN_CHARS]}
    except Exception:  # noqa: BLE001 - a template's expressions can raise anything
        return {"problem": "failed"}


def main() -> None:
    """Serve until the other end of standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    peer = socket.socket(fileno=sys.stdin.fileno())
    setup = _receive(peer)
    resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
    templates, failures = compile_all(setup["templates"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    _send(peer, failures)
    while True:
        request = _receive(peer)
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])
        answer = render(templates[request["name"]], request["variables"], setup["max_chars"])
        _send(peer, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _receive(peer: socket.socket) -> dict[str, Any]:
    (length,) = LENGTH.unpack(_receive_exactly(peer, LENGTH.size))
    value: dict[str, Any] = json.loads(_receive_exactly(peer, length))
    return value


def _receive_exactly(peer: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        piece = peer.recv(min(1 << 20, length - len(content)))
        if not piece:
            sys.exit(0)
        content += piece
    return bytes(content)


def _send(peer: socket.socket, value: dict[str, str]) -> None:
    content = json.dumps(value).encode()
    peer.sendall(LENGTH.pack(len(content)) + content)


if __name__ == "__main__":
    main()
