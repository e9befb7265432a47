"""Both ends of a measured link, over a real socket."""

from __future__ import annotations

import socket

import pytest

from cluster.link_rate import CHUNK_BYTES, SECRET_BYTES, LinkEnd, measure_link

SECRET = bytes(range(SECRET_BYTES))


def test_link_of_this_machine_has_a_rate_and_a_round_trip() -> None:
    end = LinkEnd("127.0.0.1", SECRET)
    link = measure_link("127.0.0.1", end.port, SECRET)
    assert link.bandwidth_bytes_s > CHUNK_BYTES
    assert 0 < link.round_trip_s < 5.0


def test_stranger_is_served_nothing() -> None:
    end = LinkEnd("127.0.0.1", SECRET)
    with pytest.raises(OSError):
        measure_link("127.0.0.1", end.port, bytes(SECRET_BYTES))


def test_one_peer_is_served_and_no_second() -> None:
    end = LinkEnd("127.0.0.1", SECRET)
    measure_link("127.0.0.1", end.port, SECRET)
    with pytest.raises(OSError):
        measure_link("127.0.0.1", end.port, SECRET)


def test_peer_that_closes_is_no_endless_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end = socket.create_connection(listener.getsockname())
        end.close()
        peer, _ = listener.accept()
        peer.close()
        port = listener.getsockname()[1]
    with pytest.raises(OSError):
        measure_link("127.0.0.1", port, SECRET)
