"""Readers of single fields whose values pydantic's own types do not describe. Called by `gateway.http.openai_types`.

Each returns the checked value or raises PydanticCustomError; its type is the field's kind, its text what the field
must be.
"""

from __future__ import annotations

import re
from typing import TypeAlias

from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_CHOICES = 128
"""Answers in one request: prompts times n."""
TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")

Prompt: TypeAlias = "str | list[int]"


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """One prompt or several, as text or as token ids."""
    if isinstance(value, str):
        prompts: list[Prompt] = [value]
    elif isinstance(value, list) and value and all(type(item) is int for item in value):
        prompts = [value]
    elif isinstance(value, list) and (_are_texts(value) or _are_id_lists(value)):
        prompts = value
    else:
        expected = "must be a string, a list of token ids, or a list of strings or of lists of token ids"
        raise PydanticCustomError("prompt", expected)
    if not prompts or not all(prompts):
        raise PydanticCustomError("prompt", "must not be empty")
    if len(prompts) > MAX_CHOICES:
        raise PydanticCustomError("prompt", f"must be at most {MAX_CHOICES} prompts")
    return tuple(prompts)


def _are_texts(value: list[object]) -> bool:
    return all(isinstance(item, str) for item in value)


def _are_id_lists(value: list[object]) -> bool:
    return all(isinstance(item, list) and all(type(i) is int for i in item) for item in value)


def read_stop(value: object) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if (
        not isinstance(stops, list | tuple)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops)
    ):
        expected = f"must be 1 to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters each"
        raise PydanticCustomError("stop", expected)
    return tuple(stops)


def read_stop_token_ids(value: object) -> tuple[int, ...]:
    ids = [] if value is None else value
    if (
        not isinstance(ids, list)
        or len(ids) > MAX_STOP_TOKENS
        or not all(type(i) is int and 0 <= i < 2**31 for i in ids)
    ):
        raise PydanticCustomError("stop_token_ids", f"must be at most {MAX_STOP_TOKENS} token ids from 0")
    return tuple(dict.fromkeys(ids))


def read_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of their ids."""
    biases = {} if value is None else value
    if (
        not isinstance(biases, dict)
        or len(biases) > MAX_BIASES
        or not all(
            isinstance(key, str) and TOKEN_ID.fullmatch(key) and _is_bias(bias)
            for key, bias in biases.items()
        )
    ):
        expected = (
            f"must be an object of at most {MAX_BIASES} token ids with numbers from -{MAX_BIAS} to {MAX_BIAS}"
        )
        raise PydanticCustomError("logit_bias", expected)
    return tuple(sorted((int(key), float(bias)) for key, bias in biases.items()))


def _is_bias(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_BIAS <= value <= MAX_BIAS
