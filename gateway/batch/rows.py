"""From a row of a batch's input to the same generation that the HTTP service would run for it.

A row that cannot be run becomes an error in its own row. The checks of fields, chat template, tokeniser and model
are the service's own (`gateway.http.openai_types`, `gateway.http.jobs`). Called by `gateway.batch.worker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from extraction.errors import one_line
from gateway.batch.plan import NO_DEFAULTS, RowDefaults, row_seed
from gateway.errors import ApiError
from gateway.http.jobs import Job, prepare_chat, prepare_completion
from gateway.http.openai_types import ChatRequest, CompletionRequest, read_request
from gateway.http.request_limits import parse_json
from gateway.http.settings import GatewaySettings
from gateway.text.chat_template import ChatTemplate
from gateway.text.grammar_check import GrammarChecker
from gateway.text.tokenizer import TextTokenizer

MAX_ID_CHARS = 512
CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"
NOT_IN_A_ROW = ("stream", "logprobs", "top_logprobs", "echo", "tools")
"""Fields whose answers have no column."""
LINE_FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True)
class RawRow:
    """A row as it was read: a JSON line, the columns that have a value, or why it could not be read."""

    index: int
    line: bytes | None = None
    fields: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class PreparedRow:
    """A row's job, or its error."""

    index: int
    id: str | None
    job: Job | None = None
    error: str | None = None


@dataclass(frozen=True)
class RowRequest:
    """What a row asks for: the body of a request, not yet checked field by field."""

    id: str | None
    body: dict[str, Any]
    is_chat: bool


class RowPreparer:
    """Makes jobs of one model's rows. Not safe for several threads."""

    def __init__(
        self,
        settings: GatewaySettings,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        defaults: RowDefaults = NO_DEFAULTS,
    ) -> None:
        self._settings, self._tokenizer, self._template = settings, tokenizer, template
        self._defaults = defaults
        self._grammars = GrammarChecker()
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.close()
        self._grammars.close()

    def prepare(self, row: RawRow) -> PreparedRow:
        """The job of a row; never raises for what a row holds."""
        row_id: str | None = None
        try:
            if row.error is not None:
                raise ApiError(400, row.error)
            fields = row.fields if row.line is None else parse_json(row.line, self._settings.limits)
            assert fields is not None, "a row has a line, fields or an error"
            row_id = read_id(fields)
            request = read_row(fields, row_id)
            body = fill_in(request, row.index, self._defaults, self._settings.model_name)
            job = self._job(body, request.is_chat)
            if len(job.choices) != 1:
                raise ApiError(400, "A row gets one answer: n must be 1, and prompt a single one.", param="n")
            return PreparedRow(row.index, row_id, job)
        except ApiError as error:
            message = error.message.replace("The body", "The row", 1)
            return PreparedRow(row.index, row_id, error=one_line(message))

    def _job(self, body: dict[str, Any], is_chat: bool) -> Job:
        if is_chat:
            chat = read_request(ChatRequest, body)
            preparing = prepare_chat(chat, self._settings, self._tokenizer, self._template, self._grammars)
            return self._runner.run(preparing)
        completion = read_request(CompletionRequest, body)
        return self._runner.run(
            prepare_completion(completion, self._settings, self._tokenizer, self._grammars)
        )


def read_id(fields: Mapping[str, Any]) -> str | None:
    """The row's own name. Raises ApiError."""
    name = "custom_id" if "body" in fields else "id"
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ApiError(400, f"{name} must be a string or a whole number.", param=name)
    text = str(value)
    if len(text) > MAX_ID_CHARS:
        raise ApiError(400, f"{name} is longer than {MAX_ID_CHARS} characters.", param=name)
    return text


def read_row(fields: Mapping[str, Any], row_id: str | None) -> RowRequest:
    """A row in either form: a prompt or messages with options beside it, or a line of OpenAI's batch files.

    Raises ApiError that names the field.
    """
    if "body" in fields:
        return _read_batch_line(fields, row_id)
    body = {name: value for name, value in fields.items() if name != "id" and value is not None}
    has_prompt, has_messages = "prompt" in body, "messages" in body
    if has_prompt == has_messages:
        raise ApiError(400, "A row must have exactly one of prompt and messages.", param="prompt")
    return RowRequest(row_id, body, is_chat=has_messages)


def _read_batch_line(fields: Mapping[str, Any], row_id: str | None) -> RowRequest:
    unknown = sorted(fields.keys() - LINE_FIELDS)
    if unknown:
        raise ApiError(400, f"Unknown field {unknown[0][:64]} beside body.", param=unknown[0][:64])
    if row_id is None:
        raise ApiError(400, "Missing required field custom_id.", param="custom_id")
    if fields.get("method") != "POST":
        raise ApiError(400, "method must be POST.", param="method")
    url = fields.get("url")
    if url not in (CHAT_URL, COMPLETION_URL):
        raise ApiError(400, f"url must be {CHAT_URL} or {COMPLETION_URL}.", param="url")
    body = fields["body"]
    if not isinstance(body, dict):
        raise ApiError(400, "body must be an object.", param="body")
    return RowRequest(row_id, dict(body), is_chat=url == CHAT_URL)


def fill_in(request: RowRequest, index: int, defaults: RowDefaults, model_name: str) -> dict[str, Any]:
    """The body with the job's defaults for what it leaves out. Raises ApiError for what only HTTP can do."""
    body = dict(request.body)
    for name in NOT_IN_A_ROW:
        if body.get(name) not in (None, False):
            raise ApiError(400, f"{name} is not supported in a batch.", param=name)
    if body.get("model") is None:
        body["model"] = model_name
    if body.get("seed") is None:
        body["seed"] = row_seed(defaults.seed, index)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = defaults.max_tokens
    if body.get("temperature") is None:
        body["temperature"] = defaults.temperature
    return body
