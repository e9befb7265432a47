"""The C source takes the calls that Python takes, and no others."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import FrameFault
from experts.frame import (
    HEADER_BYTES,
    Agreement,
    Header,
    check_call,
    decode_call,
    decode_header,
    encode_call,
    encode_header,
    map_bytes,
)
from experts.native_plane import AgreementStructure
from experts.native_products import library
from tests.experts.conftest import NEEDS_PLANE
from tests.experts.wire_peers import AGREED, make_call

pytestmark = NEEDS_PLANE
SEQUENCE = 3


def _source() -> Any:
    found = library()
    assert found is not None
    loaded = found.loaded
    loaded.may_begin_call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64]
    loaded.are_sound_maps.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    loaded.may_begin_call.restype = loaded.are_sound_maps.restype = ctypes.c_bool
    return loaded


def _c_takes_header(head: bytes, agreed: Agreement) -> bool:
    structure = AgreementStructure.of(agreed)
    taken: bool = _source().may_begin_call(head, ctypes.addressof(structure), SEQUENCE)
    return taken


def _python_takes_header(head: bytes, agreed: Agreement) -> bool:
    try:
        check_call(decode_header(head), agreed, SEQUENCE)
    except FrameFault:
        return False
    return True


def _frame(num_rows: int) -> tuple[bytes, bytes]:
    whole = encode_call(make_call(num_rows), AGREED, SEQUENCE, 1000)
    return whole[:HEADER_BYTES], whole[HEADER_BYTES:]


NUMBERS = st.one_of(st.integers(0, 20), st.sampled_from([64, 65, 255, 2**16 - 1, 2**31, 2**32 - 1]))
MOST = {"kind": 255, "dtype_code": 255, "trace_bytes": 255, "component": 2**16 - 1, "error_code": 2**16 - 1}


@given(
    num_rows=st.integers(1, 16),
    changes=st.dictionaries(st.sampled_from(Header._fields), NUMBERS, max_size=3),
    fits_body=st.booleans(),
    agreed=st.sampled_from(
        [AGREED, replace(AGREED, max_rows=3), replace(AGREED, width=9), replace(AGREED, dtype=torch.bfloat16)]
    ),
)
@settings(max_examples=300, deadline=None)
def test_headers_are_taken_by_both_or_by_neither(
    num_rows: int, changes: dict[str, int], fits_body: bool, agreed: Agreement
) -> None:
    head, _ = _frame(num_rows)
    header = decode_header(head)
    header = header._replace(**{name: min(value, MOST.get(name, value)) for name, value in changes.items()})
    if fits_body:  # else nearly every change would be refused for the body's length
        body = (map_bytes(header) + header.num_tokens * agreed.row_bytes) % 2**32
        header = header._replace(body_bytes=body)
    head = encode_header(header)
    assert _c_takes_header(head, agreed) == _python_takes_header(head, agreed)


@pytest.mark.parametrize("place", range(HEADER_BYTES))
def test_header_with_any_byte_changed_is_taken_by_both_or_by_neither(place: int) -> None:
    head, _ = _frame(5)
    assert _c_takes_header(head, AGREED) and _python_takes_header(head, AGREED)
    for bit in range(8):
        other = head[:place] + bytes((head[place] ^ 1 << bit,)) + head[place + 1 :]
        assert _c_takes_header(other, AGREED) == _python_takes_header(other, AGREED)


@given(num_rows=st.integers(1, 16), data=st.data())
@settings(max_examples=300, deadline=None)
def test_maps_are_sound_for_both_or_for_neither(num_rows: int, data: st.DataObject) -> None:
    head, maps = _frame(num_rows)
    header = decode_header(head)
    assert _source().are_sound_maps(head, maps)
    places = st.integers(0, len(maps) - 1)
    changed = bytearray(maps)
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):
            number = data.draw(places) // 4 * 4
            if number + 4 <= len(maps):
                changed[number : number + 4] = struct.pack("<I", data.draw(NUMBERS))
        else:
            changed[data.draw(places)] = data.draw(st.integers(0, 255))
    tokens_TD = torch.zeros(header.num_tokens, AGREED.width)
    try:
        decode_call(header, memoryview(changed), AGREED, tokens_TD)
        is_sound = True
    except FrameFault:
        is_sound = False
    assert _source().are_sound_maps(head, bytes(changed)) == is_sound
