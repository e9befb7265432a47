"""Bodies and headers from strangers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ApiError
from gateway.http.request_limits import (
    LONG_STRING,
    MARKS,
    MOST_QUOTES,
    check_headers,
    parse_json,
    read_body,
    without_long_strings,
)
from gateway.http.settings import RequestLimits

LIMITS = RequestLimits(max_body_bytes=100, max_header_bytes=200, max_json_depth=4, max_json_marks=50)


def _refusal(body: bytes, limits: RequestLimits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_json(body, limits)
    return caught.value


class _Chunks:
    """A body in pieces; counts how many were read."""

    def __init__(self, size: int, count: int) -> None:
        self.size, self.count, self.num_read = size, count, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.count):
            self.num_read += 1
            yield b"x" * self.size


def _read(chunks: Any, declared: str | None) -> bytearray:
    return asyncio.run(read_body(aiter(chunks), declared, LIMITS))


def test_body_at_limit_is_read_whole() -> None:
    assert len(_read(_Chunks(10, 10), "100")) == 100


def test_body_above_limit_is_refused_without_reading_on() -> None:
    chunks = _Chunks(30, 1000)
    with pytest.raises(ApiError) as caught:
        _read(chunks, None)
    assert caught.value.status == 413
    assert chunks.num_read == 4


@pytest.mark.parametrize("declared", ["101", "9" * 10_000])
def test_declared_size_above_limit_is_refused_before_reading(declared: str) -> None:
    chunks = _Chunks(10, 10)
    with pytest.raises(ApiError) as caught:
        _read(chunks, declared)
    assert caught.value.status == 413
    assert chunks.num_read == 0


@pytest.mark.parametrize("declared", ["000100", "-5", "1e9", "٣٣٣٣"])
def test_odd_declared_size_falls_back_to_counting(declared: str) -> None:
    assert len(_read(_Chunks(10, 10), declared)) == 100


def test_headers_path_and_query_count_together() -> None:
    scope = {"path": "/" + "p" * 49, "query_string": b"q" * 50, "headers": [(b"n" * 50, b"v" * 50)]}
    check_headers(scope, LIMITS)
    with pytest.raises(ApiError) as caught:
        check_headers({**scope, "query_string": b"q" * 51}, LIMITS)
    assert caught.value.status == 431


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"a": "', "invalid_json"),
        (b'{"a": "\\', "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": [-Infinity]}', "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b'{"a": "\\ud800"}', "invalid_utf8"),
        (b'{"a": [{"\\uDFFF": 1}]}', "invalid_utf8"),
        (b'{"a": [[[[1]]]]}', "json_too_deep"),
        (b'{"a": [' + b"1," * 60 + b"1]}", "json_too_large"),
        (b'""' * 60, "json_too_large"),
    ],
)
def test_damaged_body_is_refused(body: bytes, code: str) -> None:
    error = _refusal(body)
    assert (error.status, error.code) == (400, code)


def test_brackets_inside_strings_are_text() -> None:
    body = json.dumps({"a": '[[[[[["{\\' * 5, 'k"]': "\U0001f600 \\ud800"}).encode()
    assert parse_json(body, LIMITS) == json.loads(body)


def test_hostile_megabytes_are_refused_in_one_pass() -> None:
    limits = RequestLimits()
    for body in (b'"' + b'\\"' * 1_000_000, b"[" * 1_000_000, b"]" * 1_000_000, b'"' * 1_000_001):
        assert _refusal(body, limits).status == 400


TEXT = st.text('ab"\\[{,é😀\n', max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, JSON, max_size=4), st.booleans())
def test_any_object_within_limits_reads_as_json(value: dict[str, Any], is_ascii: bool) -> None:
    limits = replace(LIMITS, max_json_depth=100, max_json_marks=100_000)
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii).encode(), limits) == value


@given(st.binary(max_size=60) | st.text('{}[]",:\\ud8a1 NI', max_size=40).map(str.encode))
def test_any_bytes_give_an_object_or_a_refusal(body: bytes) -> None:
    try:
        assert isinstance(parse_json(body, LIMITS), dict)
    except ApiError as error:
        assert error.status == 400


@given(
    parts=st.lists(
        st.sampled_from(
            [
                *(b'"', b"\\\\", b'\\"', b"[", b"]", b"{", b"}", b",", b"a", b'"a"', b'""'),
                *(b"x" * (LONG_STRING + 1), b'"' + b"y" * (LONG_STRING + 1) + b'"'),
            ]
        ),
        max_size=30,
    )
)
def test_marks_are_the_same_without_the_content_of_long_strings(parts: list[bytes]) -> None:
    """Of a string, that it is one."""

    def marks(body: bytes | bytearray) -> list[bytes]:
        return [bytes(match.group()[:1]) for match in MARKS.finditer(body)]

    body = b"".join(parts)
    assert marks(without_long_strings(body)) == marks(body)


def test_content_of_long_strings_is_left_out() -> None:
    body = b'{"a": "' + b"x" * (1 << 20) + b'", "b": ["' + b"y" * LONG_STRING + b'"]}'
    assert without_long_strings(body) == b'{"a": "", "b": ["' + b"y" * LONG_STRING + b'"]}'
    num_looked_at = MOST_QUOTES // 2
    many = b'["' + b'", "'.join([b"z" * (LONG_STRING + 1)] * (num_looked_at + 1)) + b'"]'
    assert len(without_long_strings(many)) == LONG_STRING + 1 + 4 * num_looked_at + 4


class _CountedFinds(bytearray):
    """A body that tells how often it was searched."""

    num_finds = 0

    def find(self, *arguments: Any) -> int:
        self.num_finds += 1
        return super().find(*arguments)


@pytest.mark.parametrize("content", [b'\\"', b"\\\\", b'\\\\\\"'], ids=["quotes", "backslashes", "both"])
def test_escapes_in_a_string_are_not_looked_at_one_by_one(content: bytes) -> None:
    body = _CountedFinds(b'{"a": "' + content * LONG_STRING + b'", "b": [1, 2]}')
    shortened = without_long_strings(body)
    assert body.num_finds <= MOST_QUOTES
    assert [m.group()[:1] for m in MARKS.finditer(shortened)] == [m.group()[:1] for m in MARKS.finditer(body)]
    assert parse_json(bytes(body), RequestLimits())["b"] == [1, 2]
