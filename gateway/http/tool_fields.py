"""The fields of a chat that are about tools: functions that are offered, which may be called, calls of earlier turns.

Called by `gateway.http.openai_types`; each reader returns the checked value or raises PydanticCustomError whose text
says what the field must be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import PydanticCustomError

from gateway.errors import ApiError
from gateway.http.request_limits import parse_json
from gateway.http.response_format import MAX_SCHEMA_CHARS, NAME, wrong_with
from gateway.http.settings import RequestLimits

MAX_TOOLS = 128
MAX_CALLS = 128
"""In one message."""
MAX_ID_CHARS = 128
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function that names none."""
LIMITS = RequestLimits()


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    function: Mapping[str, Any]
    """As the client describes it, for the chat template: name, description, parameters."""
    parameters: Mapping[str, Any]
    """A schema of its arguments, which are an object."""
    is_strict: bool


@dataclass(frozen=True)
class ToolChoice:
    """Which functions are to be called."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    """The only one that may be, with mode "required"."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model has written, or is said to have written."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """As OpenAI has it: the arguments are text."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }


def read_tools(value: object) -> tuple[Tool, ...]:
    """Functions with names of their own."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise _refusal("tools", f"must be a list of at most {MAX_TOOLS} functions")
    if len(json.dumps(value)) > MAX_SCHEMA_CHARS:
        raise _refusal("tools", f"must be at most {MAX_SCHEMA_CHARS} characters of JSON")
    tools = tuple(_read_tool(item, f"its item {number}") for number, item in enumerate(value))
    if len({tool.name for tool in tools}) < len(tools):
        raise _refusal("tools", "must have functions of different names")
    return tools


def _read_tool(value: object, where: str) -> Tool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise _refusal("tools", f'{where} must be an object with type "function" and function')
    name, description, strict = (function.get(field) for field in ("name", "description", "strict"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        reason = "must have a name of 1 to 64 letters, digits, underscores and dashes"
        raise _refusal("tools", f"{where} {reason}")
    if not (description is None or isinstance(description, str)):
        raise _refusal("tools", f"{where} must have a description that is a string")
    if not (strict is None or isinstance(strict, bool)):
        raise _refusal("tools", f"{where} must have a strict of true or false")
    parameters = function.get("parameters")
    if parameters is not None and (wrong := wrong_with(parameters)) is not None:
        raise _refusal("tools", f"{where} has parameters that {wrong}")
    schema = {"type": "object", **(NO_PARAMETERS if parameters is None else parameters)}
    if schema["type"] != "object":
        raise _refusal("tools", f'{where} must have parameters whose type is "object"')
    shown = {"name": name, "description": description, "parameters": schema}
    return Tool(name, {key: item for key, item in shown.items() if item is not None}, schema, bool(strict))


def read_tool_choice(value: object) -> ToolChoice | None:
    """None where nothing is said."""
    if value is None:
        return None
    if value == "none":
        return ToolChoice("none")
    if value == "auto":
        return ToolChoice("auto")
    if value == "required":
        return ToolChoice("required")
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        wanted = 'must be none, auto, required, or {"type": "function", "function": {"name": ...}}'
        raise _refusal("tool_choice", wanted)
    return ToolChoice("required", name)


def read_tool_calls(value: object) -> tuple[ToolCall, ...]:
    """Of a message by the assistant."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_CALLS:
        raise _refusal("tool_calls", f"must be a list of at most {MAX_CALLS} calls")
    return tuple(_read_call(item) for item in value)


def _read_call(value: object) -> ToolCall:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        raise _refusal("tool_calls", 'must have calls with id, type "function" and function')
    id_, name, arguments = value.get("id"), function.get("name"), function.get("arguments")
    if not isinstance(id_, str) or not 0 < len(id_) <= MAX_ID_CHARS:
        raise _refusal("tool_calls", f"must have ids of 1 to {MAX_ID_CHARS} characters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refusal("tool_calls", "must have names of 1 to 64 letters, digits, underscores and dashes")
    if not isinstance(arguments, str):
        raise _refusal("tool_calls", "must have arguments that are a string of JSON")
    try:
        return ToolCall(id_, name, parse_json(arguments.encode(), LIMITS) if arguments.strip() else {})
    except ApiError as error:
        reason = error.message.replace("The body", "they", 1).removesuffix(".")
        raise _refusal("tool_calls", f"must have arguments that are a JSON object: {reason}") from error


def _refusal(field: str, wanted: str) -> PydanticCustomError:
    # Braces would be taken for places of values.
    return PydanticCustomError("tools", "{wanted}", {"wanted": wanted, "field": field})
