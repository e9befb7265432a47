"""The wire format: what is written is read back, and nothing else is taken for a frame."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.call import ExpertCall
from experts.errors import FrameFault
from experts.frame import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    MAX_TRACE_BYTES,
    Agreement,
    ErrorCode,
    Header,
    Kind,
    check_call,
    check_error,
    check_exact,
    decode_call,
    decode_header,
    encode_call,
    encode_error,
    encode_header,
    map_bytes,
    rows_header,
    split_by_rows,
)
from tests.experts.wire_peers import AGREED, INCARNATION, MAX_ROWS, WIDTH, make_call, rows_of

FIELD_BITS = dict(zip(Header._fields, (8, 8, 8, 16, 16, 32, 64, 64, 32, 32, 32, 32, 32, 32), strict=True))
HARMLESS = {"component", "layer", "deadline_us"}
"""Fields of a call that may hold any value within their bounds."""
VALID_CALL = decode_header(encode_call(make_call(6), AGREED, 3, 10_000)[:HEADER_BYTES])

headers = st.builds(Header, **{name: st.integers(0, 2**bits - 1) for name, bits in FIELD_BITS.items()})


@st.composite
def calls(draw: st.DrawFn, max_rows: int = MAX_ROWS) -> ExpertCall:
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    while sum(counts) > max_rows:
        counts.pop()
    experts = draw(
        st.lists(st.integers(0, 2**32 - 1), min_size=len(counts), max_size=len(counts), unique=True)
    )
    num_tokens = draw(st.integers(1, 6))
    tokens = draw(st.lists(st.integers(0, num_tokens - 1), min_size=sum(counts), max_size=sum(counts)))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return ExpertCall(
        draw(st.sampled_from(AGREED.components)),
        draw(st.integers(0, 2**32 - 1)),
        tuple(sorted(experts)),
        tuple(counts),
        tuple(tokens),
        torch.randn(num_tokens, WIDTH, generator=chance),
        draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=MAX_TRACE_BYTES)),
    )


@given(headers)
@settings(max_examples=60, deadline=None)
def test_any_header_is_read_back(header: Header) -> None:
    data = encode_header(header)
    assert len(data) == HEADER_BYTES
    assert decode_header(data) == header


def test_header_lies_on_the_wire_as_documented() -> None:
    header = Header(5, 2, 3, 4, 0, 6, 7, 8, 9, 10, 11, 12, 13, 14)
    data = encode_header(header)
    assert data[:8] == b"SAGE\x01\x05\x02\x03"
    assert struct.unpack("<HHI", data[8:16]) == (4, 0, 6)
    assert struct.unpack("<QQ", data[16:32]) == (7, 8)
    assert struct.unpack("<IIIIII", data[32:56]) == (9, 10, 11, 12, 13, 14)
    assert data[56:] == bytes(8)


@pytest.mark.parametrize(
    ("offset", "message"), [(0, "not a frame"), (3, "not a frame"), (4, "version"), (56, "reserved")]
)
def test_header_of_something_else_is_refused(offset: int, message: str) -> None:
    data = bytearray(encode_header(Header(Kind.HEARTBEAT)))
    data[offset] ^= 0x40
    with pytest.raises(FrameFault, match=message):
        decode_header(data)


@given(calls(), st.integers(1, 2**64 - 1), st.integers(1, 2**40))
@settings(max_examples=60, deadline=None)
def test_any_call_is_read_back(call: ExpertCall, sequence: int, deadline_us: int) -> None:
    head = encode_call(call, AGREED, sequence, deadline_us)
    header = decode_header(head[:HEADER_BYTES])
    check_call(header, AGREED, sequence)
    assert header.deadline_us == min(deadline_us, 2**32 - 1)
    assert len(head) == HEADER_BYTES + map_bytes(header)
    assert header.body_bytes == map_bytes(header) + call.tokens_TD.nbytes
    read = decode_call(header, memoryview(head)[HEADER_BYTES:], AGREED, call.tokens_TD)
    assert read._replace(tokens_TD=None) == call._replace(tokens_TD=None)
    assert read.tokens_TD is call.tokens_TD


@given(st.sampled_from(Header._fields), st.data())
@settings(max_examples=150, deadline=None)
def test_call_with_one_field_altered_is_refused_or_harmless(field: str, data: st.DataObject) -> None:
    value = data.draw(st.one_of(st.integers(0, 2 * MAX_ROWS), st.integers(0, 2 ** FIELD_BITS[field] - 1)))
    altered = VALID_CALL._replace(**{field: value})
    try:
        check_call(altered, AGREED, 3)
    except FrameFault:
        return
    assert altered == VALID_CALL or field in HARMLESS
    assert altered.component < len(AGREED.components)
    assert altered.deadline_us > 0


@pytest.mark.parametrize("field", Header._fields)
def test_answer_with_one_field_altered_is_refused(field: str) -> None:
    rows = rows_header(AGREED, 3, 6)
    with pytest.raises(FrameFault, match=field):
        check_exact(rows._replace(**{field: getattr(rows, field) + 1}), rows)
    error = decode_header(encode_error(AGREED, 3, ErrorCode.INTERNAL, "x")[:HEADER_BYTES])
    check_error(error, AGREED, 3)
    if field not in ("error_code", "body_bytes"):
        with pytest.raises(FrameFault, match=field):
            check_error(error._replace(**{field: getattr(error, field) + 1}), AGREED, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": 2**32 - 1},
        {"num_rows": MAX_ROWS + 1},
        {"num_rows": 0},
        {"num_tokens": 2**32 - 1},
        {"num_tokens": MAX_ROWS + 1},
        {"num_tokens": 0},
        {"num_experts": 2**32 - 1},
        {"num_experts": 7},
        {"num_experts": 0},
        {"width": 2**32 - 1},
        {"body_bytes": 2**32 - 1},
        {"trace_bytes": MAX_TRACE_BYTES + 1},
        {"component": 2},
        {"deadline_us": 0},
        {"incarnation": INCARNATION + 1},
        {"sequence": 2},
        {"sequence": 4},
        {"kind": Kind.ROWS},
        {"dtype_code": 2},
        {"error_code": 1},
    ],
)
def test_call_beyond_a_bound_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FrameFault):
        check_call(VALID_CALL._replace(**change), AGREED, 3)


@pytest.mark.parametrize("change", [{"num_rows": MAX_ROWS + 1}, {"num_tokens": MAX_ROWS + 1}])
def test_call_beyond_a_bound_is_refused_although_its_length_agrees(change: dict[str, int]) -> None:
    header = VALID_CALL._replace(**change)
    header = header._replace(body_bytes=map_bytes(header) + header.num_tokens * AGREED.row_bytes)
    with pytest.raises(FrameFault, match="allowed are 1 to 16"):
        check_call(header, AGREED, 3)


@given(st.binary(min_size=map_bytes(VALID_CALL), max_size=map_bytes(VALID_CALL)))
@settings(max_examples=60, deadline=None)
def test_random_maps_are_refused(maps: bytes) -> None:
    try:
        call = decode_call(VALID_CALL, memoryview(maps), AGREED, torch.zeros(3, WIDTH))
    except FrameFault:
        return
    call.validate()


@given(st.integers(0, map_bytes(VALID_CALL) - 1), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_maps_with_one_byte_altered_are_refused_or_still_a_call(place: int, value: int) -> None:
    maps = bytearray(encode_call(make_call(6), AGREED, 3, 10_000)[HEADER_BYTES:])
    maps[place] = value
    try:
        call = decode_call(VALID_CALL, memoryview(maps), AGREED, torch.zeros(3, WIDTH))
    except FrameFault:
        return
    call.validate()
    assert call.request_id.isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"component": "vision"},
        {"layer": -1},
        {"layer": 2**32},
        {"experts": (3, 1, 5)},
        {"experts": (1, 1, 5)},
        {"experts": (-1, 1, 5)},
        {"experts": (1, 3, 2**32)},
        {"experts": (1, 3)},
        {"counts": (2, 2, 3)},
        {"counts": (0, 3, 3)},
        {"token_of_R": (0, 1, 2, 0, 1, 3)},
        {"token_of_R": (0, 1, 2, 0, 1, -1)},
        {"experts": (), "counts": (), "token_of_R": ()},
        {"tokens_TD": torch.zeros(3, WIDTH + 1)},
        {"tokens_TD": torch.zeros(3, WIDTH, dtype=torch.bfloat16)},
        {"tokens_TD": torch.zeros(3)},
        {"request_id": "x" * (MAX_TRACE_BYTES + 1)},
        {"request_id": "line\nbreak"},
        {"request_id": "é"},
    ],
)
def test_call_that_is_none_is_not_sent(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        encode_call(make_call(6)._replace(**change), AGREED, 1, 1000)


@given(calls(max_rows=30), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_split_call_gives_the_same_rows(call: ExpertCall, max_rows: int) -> None:
    parts = list(split_by_rows(call, max_rows))
    for part in parts:
        part.validate()
        assert 1 <= part.num_rows <= max_rows and part.tokens_TD.shape[0] <= max_rows
    assert torch.equal(torch.cat([rows_of(part) for part in parts]), rows_of(call))


def test_call_that_fits_is_not_copied() -> None:
    call = make_call(6)
    (part,) = split_by_rows(call, 6)
    assert part is call


def test_call_with_more_tokens_than_fit_loses_those_that_no_row_needs() -> None:
    call = ExpertCall("model", 0, (1,), (2,), (8, 0), torch.randn(9, WIDTH))
    (part,) = split_by_rows(call, 4)
    assert part.tokens_TD.shape == (2, WIDTH)
    assert torch.equal(rows_of(part), rows_of(call))


@pytest.mark.parametrize(
    "change", [{"counts": (8, 4, 9)}, {"counts": (8, 4, 3)}, {"token_of_R": (*[0] * 15, 99)}]
)
def test_broken_call_is_not_split(change: dict[str, Any]) -> None:
    call = make_call(16)._replace(**change)
    with pytest.raises(ValueError):
        next(split_by_rows(call, 4))


def test_long_error_message_is_cut() -> None:
    frame = encode_error(AGREED, 1, ErrorCode.EXPERT, "ä" * MAX_ERROR_BYTES)
    header = decode_header(frame[:HEADER_BYTES])
    check_error(header, AGREED, 1)
    assert len(frame) == HEADER_BYTES + header.body_bytes == HEADER_BYTES + MAX_ERROR_BYTES


@pytest.mark.parametrize("change", [{"error_code": 0}, {"body_bytes": MAX_ERROR_BYTES + 1}])
def test_error_answer_beyond_a_bound_is_refused(change: dict[str, int]) -> None:
    header = decode_header(encode_error(AGREED, 1, ErrorCode.EXPERT, "no")[:HEADER_BYTES])
    with pytest.raises(FrameFault):
        check_error(header._replace(**change), AGREED, 1)


def test_agreement_on_what_no_frame_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="too many for one frame"):
        Agreement(1, 65536, torch.float32, ("model",), 16384)
    with pytest.raises(ValueError, match="int64"):
        Agreement(1, 64, torch.int64, ("model",), 16)
