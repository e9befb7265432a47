"""Turns a conversation into the text that the model continues, by the checkpoint's Jinja template.

A template comes with the model, so it runs in Jinja's immutable sandbox: it reaches no Python attributes and its
output is bounded. Not bounded is the time that a template takes before it has put anything out.

A checkpoint without a template was not trained on conversations, even where its vocabulary has tokens for them
(as the bundled stories model's has). Its messages become plain text separated by blank lines, and the model goes
on where the last one ends, as in a completion.

Special tokens that a message's text spells out, `<|im_end|>` for one, are marked with `TextTokenizer.defuse`
before rendering: they reach the model as ordinary characters, so no message can end its turn or play another role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import ApiError, ModelFileInvalid
from gateway.model_files import read_small_file, read_small_json
from gateway.openai_types import Message
from gateway.tokenizer import TextTokenizer

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_CONFIG_BYTES = 64 * 1024 * 1024
MAX_RENDERED_CHARS = 4 * 1024 * 1024
MAX_SHOWN_CHARS = 500
PLAIN_SEPARATOR = "\n\n"
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class _TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception."""


class ChatTemplate:
    """One checkpoint's template, or the plain default where `source` is None."""

    def __init__(self, source: str | None, tokenizer: TextTokenizer, token_texts: Mapping[str, str]) -> None:
        """token_texts: what the template knows as bos_token, eos_token and so on. Raises ModelFileInvalid."""
        self._tokenizer, self._token_texts = tokenizer, dict(token_texts)
        self._template: jinja2.Template | None = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except (jinja2.TemplateError, RecursionError) as error:
                raise ModelFileInvalid(TEMPLATE_FILE, f"not a usable template: {error}") from error

    @classmethod
    def from_folder(cls, path: Path, tokenizer: TextTokenizer) -> ChatTemplate:
        """Looks in chat_template.jinja, chat_template.json and tokenizer_config.json, in this order."""
        config = read_small_json(path / TOKENIZER_CONFIG_FILE, MAX_CONFIG_BYTES) or {}
        texts = {name: text for name in TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
        return cls(_find_source(path, config), tokenizer, texts)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Text for `TextTokenizer.encode_rendered`. Raises ApiError 400 when the template refuses."""
        turns = [{"role": _role(m.role), "content": self._tokenizer.defuse(m.content)} for m in messages]
        if self._template is None:
            return PLAIN_SEPARATOR.join(turn["content"] for turn in turns)
        variables = {**self._token_texts, "messages": turns, "add_generation_prompt": add_generation_prompt}
        pieces, num_chars = [], 0
        try:
            for piece in self._template.generate(**variables, tools=None, documents=None):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    break
        except _TemplateRefusal as error:
            message = f"The chat template refuses these messages: {str(error)[:MAX_SHOWN_CHARS]}"
            raise ApiError(400, message, param="messages", code="chat_template_error") from error
        except Exception as error:  # a template's expressions can raise anything
            message = "The model's chat template cannot render these messages."
            raise ApiError(400, message, param="messages", code="chat_template_error") from error
        if num_chars > MAX_RENDERED_CHARS:
            message = f"The rendered messages are longer than {MAX_RENDERED_CHARS} characters."
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        return "".join(pieces)


def _role(role: str) -> str:
    """`developer` is OpenAI's newer name of the system's role; templates know the old one."""
    return "system" if role == "developer" else role


def _find_source(path: Path, config: Mapping[str, object]) -> str | None:
    content = read_small_file(path / TEMPLATE_FILE, MAX_TEMPLATE_BYTES)
    if content is not None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileInvalid(TEMPLATE_FILE, "not UTF-8") from error
    wrapped = read_small_json(path / TEMPLATE_JSON_FILE, MAX_TEMPLATE_BYTES)
    if wrapped is not None:
        return _named_default(wrapped.get("chat_template"), TEMPLATE_JSON_FILE)
    return _named_default(config.get("chat_template"), TOKENIZER_CONFIG_FILE)


def _named_default(value: object, file: str) -> str | None:
    """A template, or the one named default in a list of them."""
    if isinstance(value, list):
        named = [v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"]
        value = named[0] if named else None
    if value is not None and not isinstance(value, str):
        raise ModelFileInvalid(file, "chat_template is neither text nor a list of named texts")
    return value


def _token_text(value: object) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object with its text."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """As `transformers` sets it up, since templates are written for that."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Unlike Jinja's own filter, leaves `<` and `&` as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
