"""What clients send: the requests of the OpenAI API that we serve, checked field by field.

A field that would change the answer and that we do not support is refused, never ignored; unknown fields without
effect are accepted. Does not check against the model (context, vocabulary); see `gateway.jobs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from gateway.errors import ApiError

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_COUNT = 2**31 - 1

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
}
"""Fields that would change the answer, with the values that ask for nothing."""
UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": (None, []),
    "function_call": (None,),
    "audio": (None,),
    "refusal": (None,),
}


def _read_prompt(value: object) -> str | list[int]:
    """A prompt, also as the only member of a list of prompts."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError("prompt", "more than one prompt in a request is not supported yet")
        value = value[0]
    if not isinstance(value, str | list) or (
        isinstance(value, list) and any(type(i) is not int for i in value)
    ):
        expected = "must be a string, a list of token ids, or a list with exactly one of these"
        raise PydanticCustomError("prompt", expected)
    if not value:
        raise PydanticCustomError("prompt", "must not be empty")
    return value


def _read_stop(value: object) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if (
        not isinstance(stops, list | tuple)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops)
    ):
        expected = f"must be 1 to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters each"
        raise PydanticCustomError("stop", expected)
    return tuple(stops)


def _read_content(value: object) -> str:
    """A string, or text parts, which are joined by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError("content", "parts other than text are not supported yet")
        text = part.get("text")
        if not isinstance(text, str):
            raise PydanticCustomError("content", "a text part must have a string in its field text")
        texts.append(text)
    return "\n".join(texts)


class Strict(BaseModel):
    """Types are not converted ("5" is no number) and numbers are finite."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How a streamed answer is sent."""

    include_usage: bool | None = None


class SageOptions(BaseModel):
    """Our extensions; none yet, and an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerationOptions(Strict):
    """What both endpoints share. A description is what an error says that the field must be."""

    model: str = Field(description="a string")
    max_tokens: int | None = Field(None, ge=1, le=MAX_COUNT, description="a whole number from 1")
    temperature: float | None = Field(None, ge=0.0, le=2.0, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0.0, le=1.0, description="a number from 0 to 1")
    top_k: int | None = Field(None, ge=0, le=MAX_COUNT, description="a whole number from 0 (no limit)")
    min_p: float | None = Field(None, ge=0.0, le=1.0, description="a number from 0 to 1")
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="a whole number of 64 bits")
    n: int | None = Field(None, ge=1, le=1, description="1: one answer in a request is supported so far")
    stop: Annotated[tuple[str, ...], PlainValidator(_read_stop)] = ()
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object")
    sage: SageOptions | None = Field(None, description="empty: it has no options yet")


class CompletionRequest(GenerationOptions):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | list[int], PlainValidator(_read_prompt)]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_read_content)]


class ChatRequest(GenerationOptions):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description=f"a list of 1 to {MAX_MESSAGES} messages"
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_COUNT, description="a whole number from 1")


RequestT = TypeVar("RequestT", bound=GenerationOptions)


def read_request(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """A checked request. Raises ApiError 400 that names the field and what it must be."""
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refusal(kind, first) from error
    _refuse_unsupported(body, UNSUPPORTED, "")
    if isinstance(request, ChatRequest):
        for position, message in enumerate(body["messages"]):
            _refuse_unsupported(message, UNSUPPORTED_IN_MESSAGE, f"messages.{position}.")
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens exclude each other."
            raise ApiError(400, message, param="max_completion_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true.", param="stream_options")
    return request


def _refusal(kind: type[GenerationOptions], error: ErrorDetails) -> ApiError:
    path = [str(part)[:64] for part in error["loc"]]
    param = ".".join(path)
    field = kind.model_fields.get(path[0])
    if error["type"] == "missing":
        return ApiError(
            400, f"Missing required field {param}.", param=param, code="missing_required_parameter"
        )
    if error["type"] in ("prompt", "stop", "content"):
        wanted = error["msg"]
    elif field is not None and field.description is not None and (len(path) == 1 or path[0] == "sage"):
        wanted = f"must be {field.description}"
    else:
        wanted = error["msg"]
    return ApiError(400, f"Invalid value for {param}: {wanted}.", param=param, code="invalid_value")


def _refuse_unsupported(body: dict[str, Any], table: Mapping[str, tuple[object, ...]], prefix: str) -> None:
    for name, neutral in table.items():
        value = body.get(name)
        if not any(type(value) is type(accepted) and value == accepted for accepted in neutral):
            message = f"{prefix}{name} is not supported yet."
            raise ApiError(400, message, param=prefix + name, code="unsupported_parameter")
