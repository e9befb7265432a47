"""What happens to fields that the requests of `gateway.http.openai_types` do not declare.

A field that would change the answer is refused by name unless its value asks for nothing. Bookkeeping of OpenAI's is
accepted silently, since nothing is expected of it. Whatever else is accepted and named in the header
`x-sage-ignored`, so that a misspelt field does not go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.errors import ApiError

IGNORED_HEADER = "x-sage-ignored"
MAX_NAMED = 16
SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "suffix": (None, ""),
    # Of other servers that speak this API.
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "prompt_logprobs": (None,),
    "typical_p": (None, 1, 1.0),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "logits_processors": (None, []),
}
"""Fields that would change the answer, with the values that ask for nothing."""
UNSUPPORTED_IN_COMPLETION: Mapping[str, tuple[object, ...]] = {
    "messages": (None,),
    "max_completion_tokens": (None,),
    "top_logprobs": (None,),
    "chat_template": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
}
"""Fields of chats."""
UNSUPPORTED_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    "prompt": (None,),
    "echo": (None, False),
    "best_of": (None, 1),
}
"""Fields of completions."""
UNSUPPORTED_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "function_call": (None,),
    "refusal": (None,),
}
HARMLESS = frozenset(
    (
        "user",
        "store",
        "metadata",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
)
"""OpenAI's bookkeeping."""


def refuse_unsupported(
    body: Mapping[str, Any], table: Mapping[str, tuple[object, ...]], prefix: str = "", where: str = "yet"
) -> None:
    """Raises ApiError 400 that names the field."""
    for name, neutral in table.items():
        value = body.get(name)
        if not any(type(value) is type(accepted) and value == accepted for accepted in neutral):
            message = f"{prefix}{name} is not supported {where}."
            raise ApiError(400, message, param=prefix + name, code="unsupported_parameter")


def ignored_fields(body: Mapping[str, Any], declared: Iterable[str]) -> list[str]:
    """Fields of a checked body that have no effect, in their order."""
    known = {*declared, *UNSUPPORTED, *UNSUPPORTED_IN_COMPLETION, *UNSUPPORTED_IN_CHAT, *HARMLESS}
    return [name for name in body if name not in known]


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The response header for these fields; short and printable whatever they are called."""
    shown = [name if SAFE_NAME.fullmatch(name) else "?" for name in names]
    if not shown:
        return {}
    return {IGNORED_HEADER: ", ".join([*shown[:MAX_NAMED], *(["..."] if len(shown) > MAX_NAMED else [])])}
