"""Turns a conversation into the text that the model continues, by the checkpoint's Jinja template.

A template comes with the model, so it is rendered in a process of its own, in a sandbox, with hard limits on time and
memory (`gateway.text.template_renderer`).

A checkpoint without a template was not trained on conversations, even where its vocabulary has tokens for them
(as the bundled stories model's has). Its messages become plain text separated by blank lines, and the model goes
on where the last one ends, as in a completion.

Special tokens that a message's text spells out, `<|im_end|>` for one, are marked with `TextTokenizer.defuse`
before rendering: they reach the model as ordinary characters, so no message can end its turn or play another role.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.errors import ApiError, ModelFileInvalid, TemplateStuck
from gateway.http.openai_types import Message
from gateway.http.tool_fields import Tool
from gateway.http.tool_grammar import CLOSE, OPEN
from gateway.media.parts import Content, ImagePart, TextPart
from gateway.stores.model_files import read_small_file, read_small_json
from gateway.text.template_renderer import RenderLimits, TemplateRenderer
from gateway.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE_JSON_FILE = "chat_template.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
DEFAULT_NAME = "default"
TOOLS_NAME = "tool_use"
"""Of the template for conversations with tools, where there is one of its own."""
NAMES_TOOLS = re.compile(r"\btools\b")
MAX_TEMPLATES = 32
MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_CONFIG_BYTES = 64 * 1024 * 1024
PLAIN_SEPARATOR = "\n\n"
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """One checkpoint's templates, or the plain default where there are none."""

    def __init__(
        self,
        sources: str | Mapping[str, str] | None,
        tokenizer: TextTokenizer,
        token_texts: Mapping[str, str],
        limits: RenderLimits | None = None,
    ) -> None:
        """sources: one template, or several by name. token_texts: what a template knows as bos_token, eos_token and
        so on. Raises ModelFileInvalid."""
        self._tokenizer, self._token_texts = tokenizer, dict(token_texts)
        named = {DEFAULT_NAME: sources} if isinstance(sources, str) else dict(sources or {})
        self.names = tuple(named)
        self._sources = named
        self._renderer = TemplateRenderer(named, limits) if named else None
        if self._renderer is not None:
            try:
                failures = self._renderer.compile()
            except TemplateStuck as error:
                raise ModelFileInvalid(
                    TEMPLATE_FILE, "compiling it breaks a limit of time or memory"
                ) from error
            for name, reason in failures.items():
                raise ModelFileInvalid(TEMPLATE_FILE, f"template {name!r} is not usable: {reason}")

    @classmethod
    def from_folder(cls, path: Path, tokenizer: TextTokenizer) -> ChatTemplate:
        """Looks in chat_template.jinja and additional_chat_templates, then in chat_template.json and
        tokenizer_config.json."""
        config = read_small_json(path / TOKENIZER_CONFIG_FILE, MAX_CONFIG_BYTES) or {}
        texts = {name: text for name in TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
        return cls(_find_sources(path, config), tokenizer, texts)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variant: str | None = None,
        tools: Sequence[Tool] = (),
    ) -> str:
        """Text for `TextTokenizer.encode_rendered`. Raises ApiError 400 when the template refuses.

        variant: the name of one of several templates; None means the default, or the one for tools. tools: that the
        model is to know.
        """
        has_tools = bool(tools) or any(m.role == "tool" or m.tool_calls for m in messages)
        is_own = has_tools and variant is None and TOOLS_NAME in self.names
        name = TOOLS_NAME if is_own else self._choose(variant)
        if has_tools:
            self._check_tools(name, "tools" if tools else "messages")
        if self._renderer is None:
            return PLAIN_SEPARATOR.join(self._plain_text(m.content) for m in messages)
        turns = [self._turn(message) for message in messages]
        variables = {
            **self._token_texts,
            "messages": turns,
            "add_generation_prompt": add_generation_prompt,
            "tools": [self._described(tool) for tool in tools] or None,
            "documents": None,
        }
        try:
            answer = self._renderer.render(name, variables)
        except TemplateStuck as error:
            logger.warning("%s", error)
            raise _refusal("The model's chat template took too long or too much memory.") from error
        if "text" in answer:
            return answer["text"]
        if "refusal" in answer:
            raise _refusal(f"The chat template refuses these messages: {answer['refusal']}")
        if answer.get("problem") == "long":
            message = f"The rendered messages are longer than {self._renderer.limits.max_chars} characters."
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        raise _refusal("The model's chat template cannot render these messages.")

    def close(self) -> None:
        """End the rendering process, if there is one."""
        if self._renderer is not None:
            self._renderer.close()

    def _turn(self, message: Message) -> dict[str, Any]:
        """As templates know it: with calls whose arguments are values, not text."""
        turn: dict[str, Any] = {"role": _role(message.role), "content": self._content(message.content)}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": self._tokenizer.defuse(call.id),
                    "function": {"name": call.name, "arguments": self._defused(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = self._tokenizer.defuse(message.tool_call_id)
        return turn

    def _described(self, tool: Tool) -> dict[str, Any]:
        return {"type": "function", "function": self._defused(tool.function)}

    def _defused(self, value: Any) -> Any:
        """JSON in which no text spells out a special token; its depth was bounded when it was read."""
        if isinstance(value, str):
            return self._tokenizer.defuse(value)
        if isinstance(value, Mapping):
            return {self._tokenizer.defuse(key): self._defused(item) for key, item in value.items()}
        return [self._defused(item) for item in value] if isinstance(value, list) else value

    def _check_tools(self, name: str, param: str) -> None:
        """Raises ApiError 400 where the model was not taught tools, or writes calls in another way than is read."""
        source = self._sources.get(name, "")
        if not NAMES_TOOLS.search(source):
            message = "This model takes no tools: its chat template has no place for them."
            raise ApiError(400, message, param=param, code="unsupported_parameter")
        if OPEN not in source or {OPEN, CLOSE} & set(self._tokenizer.special_tokens.values()):
            message = f"This model takes no tools here: it does not write calls in {OPEN} as text."
            raise ApiError(400, message, param=param, code="unsupported_parameter")

    def _content(self, content: Content) -> str | list[dict[str, str]]:
        """As templates know it: media by their kind, for which they leave a place. Between parts most put nothing."""
        if isinstance(content, str):
            return self._tokenizer.defuse(content)
        parts = []
        for part in content:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": self._tokenizer.defuse_part(part.text)})
            else:
                parts.append({"type": "image" if isinstance(part, ImagePart) else "audio"})
        return parts

    def _plain_text(self, content: Content) -> str:
        if not isinstance(content, str):
            raise _refusal(
                "This model has no chat template, without which there are no places for parts of a message."
            )
        return self._tokenizer.defuse(content)

    def _choose(self, variant: str | None) -> str:
        """As `transformers` does without tools. A client names a template and never brings one."""
        if variant is None and (not self.names or DEFAULT_NAME in self.names):
            return DEFAULT_NAME
        if variant in self.names:
            return variant
        known = ", ".join(name[:64] for name in self.names[:8]) or "none: this model has no chat template"
        what = "this model has no default one" if variant is None else "must be one of the model's"
        message = f"Invalid value for chat_template: {what} ({known})."
        raise ApiError(400, message, param="chat_template", code="invalid_value")


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="chat_template_error")


def _role(role: str) -> str:
    """`developer` is OpenAI's newer name of the system's role; templates know the old one."""
    return "system" if role == "developer" else role


def _find_sources(path: Path, config: Mapping[str, object]) -> dict[str, str]:
    """Templates by name. As in `transformers`, files of their own come before what the tokenizer's config says."""
    sources = {}
    content = read_small_file(path / TEMPLATE_FILE, MAX_TEMPLATE_BYTES)
    if content is not None:
        sources[DEFAULT_NAME] = _decode(content, TEMPLATE_FILE)
    folder = path / TEMPLATE_FOLDER
    files = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
    if len(files) > MAX_TEMPLATES:
        raise ModelFileInvalid(TEMPLATE_FOLDER, f"has more than {MAX_TEMPLATES} templates")
    for file in files:
        content = read_small_file(file, MAX_TEMPLATE_BYTES)
        if content is not None:
            sources[file.stem] = _decode(content, f"{TEMPLATE_FOLDER}/{file.name}")
    if sources:
        return sources
    wrapped = read_small_json(path / TEMPLATE_JSON_FILE, MAX_TEMPLATE_BYTES)
    if wrapped is not None:
        return _read_named(wrapped.get("chat_template"), TEMPLATE_JSON_FILE)
    return _read_named(config.get("chat_template"), TOKENIZER_CONFIG_FILE)


def _decode(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileInvalid(file, "not UTF-8") from error


def _read_named(value: object, file: str) -> dict[str, str]:
    """One template, or a list of them with names."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_NAME: value}
    if not isinstance(value, list) or len(value) > MAX_TEMPLATES:
        raise ModelFileInvalid(file, "chat_template is neither text nor a list of named texts")
    sources = {}
    for item in value:
        name, source = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise ModelFileInvalid(file, "chat_template is neither text nor a list of named texts")
        sources[name] = source
    return sources


def _token_text(value: object) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object with its text."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
