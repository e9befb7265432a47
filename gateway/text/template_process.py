"""What renders chat templates, in `gateway.text.confined_process`.

A template comes with the model, so nothing of it runs in a process that matters, and here it runs in Jinja's immutable
sandbox: it reaches no Python attributes. Compiling counts as running, since Jinja evaluates constant expressions then.
Imports nothing of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

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


def prepare(setup: dict[str, Any]) -> tuple[dict[str, str], Callable[[dict[str, Any]], dict[str, str]]]:
    """setup: templates by name, and the most characters of a rendered text. Returns the templates that cannot be
    compiled with why, and what answers a template's name and its variables."""
    templates, failures = compile_all(setup["templates"])
    return failures, lambda asked: render(templates[asked["name"]], asked["variables"], setup["max_chars"])
