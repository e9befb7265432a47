"""The field `response_format`: an answer that is JSON, of any kind or by a schema, and the grammar that it becomes.

Called by `gateway.http.openai_types` for the field, and by `gateway.http.jobs` for the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from gateway.errors import ApiError, GrammarRefused
from gateway.text.grammar_check import GrammarChecker

MAX_SCHEMA_CHARS = 128 * 1024
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
OPTIONS_KEY = "x-guidance"
"""Where `llguidance` has options within a schema."""
WHITESPACE = r" |\r?\n[ \t]{0,16}"
"""Between two parts of JSON: a space, or a new line with its indentation. Unbounded, it is what a model that has lost
its way writes until its tokens are used up."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
UNKNOWN_KEYS = re.compile(r"Unimplemented keys: (\[.*\])")
UNKNOWN_FORMAT = re.compile(r"Unknown format: (.*)")


@dataclass(frozen=True)
class JsonForm:
    """What an answer is to be."""

    schema: Mapping[str, Any]
    is_strict: bool = True
    """Whether keywords that are not enforced are an error."""
    name: str | None = None

    @property
    def grammar(self) -> str:
        """As text for `llguidance`."""
        return json.dumps({"grammars": [{"json_schema": with_options(self.schema, self.is_strict)}]})


@dataclass(frozen=True)
class CheckedGrammar:
    """A grammar that can be followed, or none."""

    text: str | None = None
    unenforced: tuple[str, ...] = ()
    """Fields of the request that it leaves out."""


NO_GRAMMAR = CheckedGrammar()


def with_options(schema: Mapping[str, Any], is_strict: bool) -> dict[str, Any]:
    """A schema with how `llguidance` is to read it."""
    return {**schema, OPTIONS_KEY: {"whitespace_pattern": WHITESPACE, "lenient": not is_strict}}


def read_response_format(value: object) -> JsonForm | None:
    """None is any text. Raises PydanticCustomError."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise _refusal("must be an object whose type is text, json_object or json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return JsonForm(ANY_OBJECT)
    return _read_json_schema(value.get("json_schema"))


def _read_json_schema(value: object) -> JsonForm:
    if not isinstance(value, dict):
        raise _refusal("json_schema must be an object with name and schema")
    name, strict = value.get("name"), value.get("strict")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refusal("json_schema.name must be 1 to 64 letters, digits, underscores and dashes")
    if not (strict is None or isinstance(strict, bool)):
        raise _refusal("json_schema.strict must be true or false")
    if (wrong := wrong_with(value.get("schema"))) is not None:
        raise _refusal(f"json_schema.schema {wrong}")
    return JsonForm(value["schema"], bool(strict), name)


def wrong_with(schema: object) -> str | None:
    """Why something is no schema that could be looked at, if so."""
    if not isinstance(schema, dict):
        return "must be an object"
    if OPTIONS_KEY in schema:
        return f"must not have the key {OPTIONS_KEY}"
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        return f"must be at most {MAX_SCHEMA_CHARS} characters of JSON"
    return None


async def check_form(form: JsonForm | None, grammars: GrammarChecker, owner: str) -> CheckedGrammar:
    """Raises ApiError 400 that says what of the schema cannot be followed, PreparationBusy."""
    if form is None:
        return NO_GRAMMAR
    if form.schema is ANY_OBJECT:  # ours, which need not wait
        return CheckedGrammar(form.grammar)
    try:
        warnings = await grammars.check_in_turn(owner, form.grammar)
    except GrammarRefused as error:
        named = "response_format" if form.name is None else f"response_format '{form.name}'"
        message = f"Invalid schema for {named}: {in_words(error.reason)}."
        raise ApiError(400, message, param="response_format", code="invalid_json_schema") from error
    names = tuple(f"response_format.{keyword}" for keyword in keywords_of(warnings))
    return CheckedGrammar(form.grammar, names)


def in_words(reason: str) -> str:
    """What `llguidance` says of keywords, in the words of our errors."""
    keys = UNKNOWN_KEYS.search(reason)
    if keys is not None:
        return f"keywords that are not supported: {', '.join(_listed(keys[1]))}"
    if (unknown := UNKNOWN_FORMAT.search(reason)) is not None:
        return f"a format that is not supported: {unknown[1]}"
    if reason.startswith("oneOf "):
        return "oneOf is not supported where more than one of its schemas may hold; use anyOf"
    return reason


def keywords_of(warnings: Iterable[str]) -> list[str]:
    """Each keyword that warnings name, once."""
    found: dict[str, None] = {}
    for warning in warnings:
        keys = UNKNOWN_KEYS.search(warning)
        if keys is not None:
            found |= dict.fromkeys(_listed(keys[1]))
        elif UNKNOWN_FORMAT.search(warning):
            found["format"] = None
        else:
            found[warning.split(" ", 1)[0]] = None
    return list(found)


def _listed(keys: str) -> list[str]:
    """From a list as it stands in a message, which may be cut off."""
    return re.findall(r'"([^"]*)"', keys)


def _refusal(wanted: str) -> PydanticCustomError:
    # Braces would be taken for places of values.
    return PydanticCustomError("response_format", "{wanted}", {"wanted": wanted})
