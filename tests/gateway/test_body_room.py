"""Bodies of many requests at once, and of one owner."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from gateway.errors import RouterBusy
from gateway.http.body_room import FREE_BYTES, BodyRoom

MIB = 1 << 20


def test_room_is_for_what_all_bodies_have_beyond_the_first_of_each() -> None:
    room = BodyRoom(10 * MIB)
    with ExitStack() as stack:
        for owner in ("a", "b"):
            hold = stack.enter_context(room.entered(owner))
            for num_bytes in (MIB, 5 * MIB, 5 * MIB + FREE_BYTES):
                hold(num_bytes)
        assert room.nbytes == 10 * MIB
        with room.entered("c") as hold:
            hold(FREE_BYTES)
            with pytest.raises(RouterBusy):
                hold(FREE_BYTES + 1)
        assert room.nbytes == 10 * MIB
    assert room.nbytes == 0


def test_nobody_has_more_than_half() -> None:
    room = BodyRoom(10 * MIB)
    with room.entered("a") as one, room.entered("a") as two, room.entered("b") as other:
        one(3 * MIB + FREE_BYTES)
        with pytest.raises(RouterBusy):
            two(3 * MIB + FREE_BYTES)
        two(2 * MIB + FREE_BYTES)
        other(5 * MIB + FREE_BYTES)
    assert room.nbytes == 0
