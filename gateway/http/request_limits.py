"""Reads requests from strangers: size and shape are checked before anything is built from them.

Does not know what a request means; see `gateway.http.openai_types`. Called by `gateway.http.app` and its middleware.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from gateway.errors import ApiError
from gateway.http.body_room import Hold, no_matter
from gateway.http.settings import RequestLimits

LONG_STRING, MOST_QUOTES = 64 << 10, 512
"""Bytes of a string whose content is left out where marks are looked for, and how many quotes are looked at for that:
files in base64 are few and long, and one string may have millions that are escaped."""
MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[{\]},]', re.DOTALL)
"""A string, or one character of JSON's structure. An unfinished string reaches to the end, so the time that a
scan takes is linear in the body."""
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_headers(scope: Any, limits: RequestLimits) -> None:
    """Raises ApiError 431. scope: of ASGI, type http."""
    num_bytes = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > limits.max_header_bytes:
        message = f"Headers and path of {num_bytes} bytes; at most {limits.max_header_bytes} are accepted."
        raise ApiError(431, message, code="headers_too_large")


async def read_body(
    chunks: AsyncIterator[bytes], declared: str | None, limits: RequestLimits, hold: Hold = no_matter
) -> bytearray:
    """The whole body. Raises ApiError 413 as soon as it is, or is declared to be, above the limit, and 408 when it
    comes too slowly; what `hold` raises.

    declared: the value of Content-Length. hold: told of the body's length before it becomes that long.
    """
    if declared is not None and _is_above(declared, limits.max_body_bytes):
        _refuse_size(limits)
    body = bytearray()
    grace_ends = asyncio.get_running_loop().time() + limits.body_grace_s
    try:
        async with asyncio.timeout_at(grace_ends) as deadline:
            async for chunk in chunks:
                if len(body) + len(chunk) > limits.max_body_bytes:
                    _refuse_size(limits)
                hold(len(body) + len(chunk))
                body += chunk
                deadline.reschedule(grace_ends + len(body) / limits.min_body_bytes_per_s)
    except TimeoutError as error:
        raise ApiError(408, "The body came too slowly.", code="body_timeout") from error
    return body


def parse_json(body: bytes | bytearray, limits: RequestLimits) -> dict[str, Any]:
    """A JSON object of plain values: no NaN, no lone surrogates, bounded depth and count. Raises ApiError 400."""
    check_shape(body, limits)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8 at byte {error.start}.", code="invalid_utf8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(
            400, f"The body is not valid JSON: {error.msg} at {where}.", code="invalid_json"
        ) from error
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        message = "The body is not valid JSON: a number has too many digits."
        raise ApiError(400, message, code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    if b"\\" in body and SURROGATE_ESCAPE.search(body) and _has_lone_surrogate(value):
        raise ApiError(
            400, "The body holds half of a surrogate pair (\\ud800 to \\udfff).", code="invalid_utf8"
        )
    return value


def check_shape(body: bytes | bytearray, limits: RequestLimits) -> None:
    """Bound depth and number of values without building any. Raises ApiError 400."""
    depth = 0
    body = without_long_strings(body)
    for num_marks, match in enumerate(MARKS.finditer(body), start=1):
        mark = body[match.start()]
        if mark in b"[{":
            depth += 1
            if depth > limits.max_json_depth:
                message = f"JSON nested deeper than {limits.max_json_depth} levels."
                raise ApiError(400, message, code="json_too_deep")
        elif mark in b"]}":
            depth -= 1
        if num_marks > limits.max_json_marks:
            message = f"JSON with more than {limits.max_json_marks} strings, brackets and commas."
            raise ApiError(400, message, code="json_too_large")


def without_long_strings(body: bytes | bytearray) -> bytes | bytearray:
    """The same marks, in fewer bytes: the pattern takes a hundred times as long for a byte as finding a quote does."""
    parts: list[bytes | bytearray] = []
    kept_to, begin, quote = 0, -1, -1  # begin: of an open string, else below 0
    for _ in range(MOST_QUOTES):
        before, quote = quote, body.find(b'"', quote + 1)
        if quote < 0:
            break
        if begin < 0:
            begin = quote
        elif not _is_escaped(body, before, quote):
            if quote - begin - 1 > LONG_STRING:
                parts.append(body[kept_to : begin + 1])
                kept_to = quote
            begin = -1
    return b"".join((*parts, body[kept_to:])) if parts else body


def _is_escaped(body: bytes | bytearray, before: int, quote: int) -> bool:
    """Whether a quote stands behind an odd number of backslashes, of those after the quote before it."""
    if body[quote - 1] != ord("\\"):
        return False
    between = body[before + 1 : quote]
    return (len(between) - len(between.rstrip(b"\\"))) % 2 == 1


def _is_above(digits: str, limit: int) -> bool:
    """False for what is no number. Compares by length first: `int` refuses thousands of digits."""
    if not (digits.isascii() and digits.isdecimal()):
        return False
    digits = digits.lstrip("0")
    return len(digits) > len(str(limit)) or int(digits or "0") > limit


def _refuse_size(limits: RequestLimits) -> NoReturn:
    message = f"The body is larger than {limits.max_body_bytes} bytes."
    raise ApiError(413, message, code="body_too_large")


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"{name} is not a JSON number.", code="invalid_json")


def _has_lone_surrogate(value: object) -> bool:
    """Looks at every string and key; the depth was bounded before."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(_has_lone_surrogate(key) or _has_lone_surrogate(item) for key, item in value.items())
    return isinstance(value, list) and any(map(_has_lone_surrogate, value))
