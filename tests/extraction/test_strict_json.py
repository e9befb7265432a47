"""JSON from outside: what Python alone would take and no other reader could read is refused."""

from __future__ import annotations

import pytest

from extraction.errors import CheckpointDamaged
from extraction.strict_json import MAX_DEPTH, parse_object


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[]", "no JSON object"),
        (b'{"a": NaN}', "infinite or NaN"),
        (b'{"a": [-Infinity]}', "infinite or NaN"),
        (b'{"a": 1e999}', "infinite or NaN"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested deeper"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "no JSON"),
    ],
)
def test_what_is_no_plain_object_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(CheckpointDamaged, match=rf"^f\.json: .*{reason}"):
        parse_object(raw, "f.json")


def test_repeated_key_is_refused_where_readers_could_differ() -> None:
    raw = b'{"x": {"a": 1, "b": 2, "a": 3}}'
    assert parse_object(raw, "f.json") == {"x": {"a": 3, "b": 2}}
    with pytest.raises(CheckpointDamaged, match=r"^f: has a header that names 'a' twice$"):
        parse_object(raw, "f", what="has a header that ", has_unique_keys=True)


def test_ordinary_values_pass_unchanged() -> None:
    raw = '{"größe": [1, 2.5, null, true, {"😀": "\\ud83d\\ude00"}]}'.encode()
    assert parse_object(raw, "f.json") == {"größe": [1, 2.5, None, True, {"😀": "😀"}]}
