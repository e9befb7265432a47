"""What clients send: the requests of the OpenAI API that we serve, checked field by field.

Fields that are not declared here are the business of `gateway.http.field_policy`. Does not check against the model
(context, vocabulary); see `gateway.http.jobs`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails

from gateway.errors import ApiError
from gateway.http.field_policy import (
    UNSUPPORTED,
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETION,
    UNSUPPORTED_IN_MESSAGE,
    ignored_fields,
    refuse_unsupported,
)
from gateway.http.openai_fields import (
    MAX_CHOICES,
    Prompt,
    read_logit_bias,
    read_prompts,
    read_stop,
    read_stop_token_ids,
)
from gateway.http.response_format import JsonForm, read_response_format
from gateway.http.speech_fields import AudioOptions, Modality, SpokenTurn
from gateway.http.tool_fields import (
    MAX_ID_CHARS,
    Tool,
    ToolCall,
    ToolChoice,
    read_tool_calls,
    read_tool_choice,
    read_tools,
)
from gateway.media.parts import Content, read_content
from router.effort import EffortChoice
from router.routing_choice import PolicyName
from router.speech.facts import MOST_FRAMES

MAX_MESSAGES = 4096
MAX_COUNT = 2**31 - 1
MAX_LOGPROBS = 20
MOST_SPOKEN = 8
"""Answers of one request: each may take 16 MB."""
READ_BY_HAND = ("prompt", "stop", "stop_token_ids", "logit_bias", "content", "response_format", "tools")
"""Kinds of errors whose text says what the field must be."""


class Strict(BaseModel):
    """Types are not converted ("5" is no number) and numbers are finite."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """How a streamed answer is sent."""

    include_usage: bool | None = None


class SageOptions(BaseModel):
    """Our extensions: how the tokens are routed to experts, and how long speech may be. An unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: PolicyName | None = Field(None, description="native or snarc")
    effort: EffortChoice | None = Field(None, description="wake, focus, crisis or auto")
    explain: bool | None = Field(None, description="true or false")
    max_speech_frames: int | None = Field(
        None, ge=1, le=MOST_FRAMES, description=f"a whole number from 1 to {MOST_FRAMES}; 25 are two seconds"
    )


class FeedbackRequest(BaseModel):
    """The body of POST /v1/feedback."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    request_id: str = Field(min_length=1, max_length=128, description="an answer's id, as a string")
    score: float = Field(ge=-1.0, le=1.0, description="a number from -1 to 1")


class GenerationOptions(Strict):
    """What both endpoints share. A description is what an error says that the field must be."""

    model: str = Field(description="a string")
    max_tokens: int | None = Field(None, ge=1, le=MAX_COUNT, description="a whole number from 1")
    min_tokens: int | None = Field(
        None, ge=0, le=MAX_COUNT, description="a whole number from 0 to max_tokens"
    )
    temperature: float | None = Field(None, ge=0.0, le=2.0, description="a number from 0 to 2")
    top_p: float | None = Field(None, ge=0.0, le=1.0, description="a number from 0 to 1")
    top_k: int | None = Field(None, ge=0, le=MAX_COUNT, description="a whole number from 0 (no limit)")
    min_p: float | None = Field(None, ge=0.0, le=1.0, description="a number from 0 to 1")
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0, description="a number from -2 to 2")
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0, description="a number from -2 to 2")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100.0, description="a number from 0.01 to 100; 1 is none"
    )
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(read_logit_bias)] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="a whole number of 64 bits")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description=f"a whole number from 1 to {MAX_CHOICES}")
    stop: Annotated[tuple[str, ...], PlainValidator(read_stop)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(read_stop_token_ids)] = ()
    ignore_eos: bool | None = Field(None, description="true or false")
    response_format: Annotated[JsonForm | None, PlainValidator(read_response_format)] = None
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object")
    sage: SageOptions | None = Field(
        None,
        description="an object with policy (native or snarc), effort (wake, focus, crisis or auto), explain, "
        "max_speech_frames",
    )

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token's logprob; None reports no logprobs."""


class CompletionRequest(GenerationOptions):
    """The body of POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(read_prompts)]
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_COUNT, description="a whole number from 1, or 0 with echo"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"a whole number from 0 to {MAX_LOGPROBS}"
    )
    echo: bool | None = Field(None, description="true or false")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="equal to n: all answers are returned"
    )

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content, PlainValidator(read_content)]
    """Empty where `audio` or `tool_calls` stand in for it."""
    audio: SpokenTurn | None = None
    """By the assistant: an answer that was spoken, whose text `gateway.http.spoken_answers` knows."""

    tool_calls: Annotated[tuple[ToolCall, ...], PlainValidator(read_tool_calls)] = ()
    """By the assistant."""
    tool_call_id: str | None = Field(None, min_length=1, max_length=MAX_ID_CHARS)
    """Of the call whose result a message by a tool is."""

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, turn: Any) -> Any:
        """OpenAI's clients send such answers back as they came, without a content."""
        if not isinstance(turn, dict) or turn.get("role") != "assistant" or turn.get("content") is not None:
            return turn
        return {**turn, "content": ""} if turn.get("audio") is not None or turn.get("tool_calls") else turn


class ChatRequest(GenerationOptions):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description=f"a list of 1 to {MAX_MESSAGES} messages"
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_COUNT, description="a whole number from 1")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"a whole number from 0 to {MAX_LOGPROBS}"
    )
    chat_template: str | None = Field(
        None, max_length=64, description="the name of one of the model's chat templates"
    )
    modalities: list[Modality] | None = Field(
        None, min_length=1, max_length=2, description='a list of "text" and "audio"'
    )
    audio: AudioOptions | None = Field(None, description="an object with voice and format (wav or pcm16)")
    tools: Annotated[tuple[Tool, ...], PlainValidator(read_tools)] = ()
    tool_choice: Annotated[ToolChoice | None, PlainValidator(read_tool_choice)] = None
    parallel_tool_calls: bool | None = Field(None, description="true or false")

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """Those that the model is to know."""
        return () if self.tool_choice == ToolChoice("none") else self.tools

    @property
    def is_spoken(self) -> bool:
        """Whether the answer is to be heard, too."""
        return "audio" in (self.modalities or ())

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


DESCRIBED: dict[str, type[BaseModel]] = {"sage": SageOptions, "audio": AudioOptions}
"""Objects within a request whose fields say what they must be."""
RequestT = TypeVar("RequestT", bound=GenerationOptions)


def read_feedback(body: dict[str, Any]) -> FeedbackRequest:
    """Raises ApiError 400 that names the field and what it must be."""
    try:
        return FeedbackRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refusal(FeedbackRequest, first) from error


def read_request(kind: type[RequestT], body: dict[str, Any]) -> RequestT:
    """A checked request. Raises ApiError 400 that names the field and what it must be."""
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refusal(kind, first) from error
    refuse_unsupported(body, UNSUPPORTED)
    if isinstance(request, ChatRequest):
        refuse_unsupported(body, UNSUPPORTED_IN_CHAT, where="in a chat")
        for position, message in enumerate(body["messages"]):
            refuse_unsupported(message, UNSUPPORTED_IN_MESSAGE, f"messages.{position}.")
        _check_chat(request)
    if isinstance(request, CompletionRequest):
        refuse_unsupported(body, UNSUPPORTED_IN_COMPLETION, where="in a completion")
        _check_completion(request)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true.", param="stream_options")
    return request


def ignored_in(kind: type[GenerationOptions], body: dict[str, Any]) -> list[str]:
    """Names of fields of a checked body that have no effect, each once."""
    known_within: dict[str, type[BaseModel]] = {"stream_options": StreamOptions, "audio": AudioOptions}
    nested = [
        f"{field}.{name}"
        for field, inner in known_within.items()
        if field in kind.model_fields
        for name in body.get(field) or ()
        if name not in inner.model_fields
    ]
    seen: dict[str, None] = {}
    if kind is ChatRequest:
        known = {*Message.model_fields, *UNSUPPORTED_IN_MESSAGE}
        seen = {f"messages.{name}": None for turn in body["messages"] for name in turn if name not in known}
    return [*ignored_fields(body, kind.model_fields), *nested, *seen]


def _check_completion(request: CompletionRequest) -> None:
    if request.max_tokens == 0 and not request.echo:
        _refuse_value("max_tokens", "must be a whole number from 1, or 0 with echo")
    if request.best_of not in (None, request.num_choices):
        _refuse_value("best_of", "must be equal to n: all answers are returned")
    if len(request.prompt) * request.num_choices > MAX_CHOICES:
        _refuse_value("n", f"prompts times n must be at most {MAX_CHOICES}")
    if request.sage is not None and request.sage.max_speech_frames is not None:
        raise ApiError(400, "A completion is not spoken, only a chat.", param="sage.max_speech_frames")


def _check_chat(request: ChatRequest) -> None:
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        message = "max_tokens and max_completion_tokens exclude each other."
        raise ApiError(400, message, param="max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
    for position, turn in enumerate(request.messages):
        if turn.audio is not None and turn.role != "assistant":
            param = f"messages.{position}.audio"
            raise ApiError(400, f"{param} is only allowed in a message by the assistant.", param=param)
    _check_tools(request)
    _check_speech(request)


def _check_tools(request: ChatRequest) -> None:
    """Choice and offer fit each other, and messages by tools the calls before them."""
    choice = request.tool_choice
    if choice is not None and choice.mode == "required" and not request.tools:
        raise ApiError(400, "tool_choice is only allowed with tools.", param="tool_choice")
    if choice is not None and choice.name not in (None, *(tool.name for tool in request.tools)):
        _refuse_value("tool_choice", "must name one of tools")
    if request.offered_tools and request.response_format is not None:
        _refuse_value("response_format", "must be text where tools may be called")
    known: set[str] = set()
    for position, turn in enumerate(request.messages):
        where = f"messages.{position}"
        if turn.tool_calls and turn.role != "assistant":
            message = f"{where}.tool_calls is only allowed in a message by the assistant."
            raise ApiError(400, message, param=f"{where}.tool_calls")
        known |= {call.id for call in turn.tool_calls}
        if (turn.role == "tool") != (turn.tool_call_id is not None):
            message = f"{where}.tool_call_id goes with the role tool, which needs one."
            raise ApiError(400, message, param=f"{where}.tool_call_id")
        if turn.tool_call_id is not None and turn.tool_call_id not in known:
            _refuse_value(f"{where}.tool_call_id", "must be the id of a call in a message before")


def _check_speech(request: ChatRequest) -> None:
    frames = None if request.sage is None else request.sage.max_speech_frames
    given = {"audio": request.audio, "sage.max_speech_frames": frames}
    for param, value in given.items():
        if value is not None and not request.is_spoken:
            message = f'{param} is only allowed with modalities ["text", "audio"].'
            raise ApiError(400, message, param=param)
    if request.is_spoken and request.stream and request.audio is not None and request.audio.format == "wav":
        _refuse_value("audio.format", "must be pcm16 when stream is true, since WAV begins with its length")
    if request.is_spoken and request.response_format is not None:
        _refuse_value("response_format", "must be text where answers are spoken")
    if request.is_spoken and request.offered_tools:
        _refuse_value("tools", "must not be offered where answers are spoken")
    if request.is_spoken and request.num_choices > MOST_SPOKEN:
        _refuse_value("n", f"must be at most {MOST_SPOKEN} where answers are spoken")


def _refuse_value(param: str, wanted: str) -> None:
    raise ApiError(400, f"Invalid value for {param}: {wanted}.", param=param, code="invalid_value")


def _refusal(kind: type[BaseModel], error: ErrorDetails) -> ApiError:
    path = [str(part)[:64] for part in error["loc"]]
    param = ".".join(path)
    owner = DESCRIBED.get(path[0], kind) if len(path) > 1 else kind
    field = owner.model_fields.get(path[0] if owner is kind else path[-1])
    if error["type"] == "missing":
        return ApiError(
            400, f"Missing required field {param}.", param=param, code="missing_required_parameter"
        )
    if error["type"] == "extra_forbidden":
        wanted = f"is no field here; fields are {', '.join(owner.model_fields)}"
    elif error["type"] in READ_BY_HAND:
        wanted = error["msg"]
    elif field is not None and field.description is not None and (len(path) == 1 or owner is not kind):
        wanted = f"must be {field.description}"
    else:
        wanted = error["msg"]
    return ApiError(400, f"Invalid value for {param}: {wanted}.", param=param, code="invalid_value")
