"""What is made of whoever answers at a head's address."""

from __future__ import annotations

import socket
import threading
from typing import Any

from cluster.head_probe import Answer, probe_head
from cluster.ray_token import Token
from tests.cluster.fake_head import FakeHead, listening

TOKEN = Token("right", "a test")


def test_closed_head_takes_the_right_token_and_tells_its_versions() -> None:
    with listening(FakeHead("right")) as address:
        facts = probe_head(address, TOKEN)
    assert (facts.without_token, facts.with_token, facts.is_open) == (Answer.REFUSED, Answer.TAKEN, False)
    assert (facts.ray_version, facts.python_version) == ("2.60.0", "3.10.1")


def test_closed_head_refuses_the_wrong_token_and_tells_nothing() -> None:
    with listening(FakeHead("other")) as address:
        facts = probe_head(address, TOKEN)
    assert (facts.without_token, facts.with_token) == (Answer.REFUSED, Answer.REFUSED)
    assert facts.ray_version == ""


def test_closed_head_without_a_token_to_try() -> None:
    with listening(FakeHead("other")) as address:
        facts = probe_head(address, None)
    assert (facts.without_token, facts.with_token) == (Answer.REFUSED, None)


def test_open_head_is_seen_as_open_with_and_without_a_token() -> None:
    with listening(FakeHead(None)) as address:
        assert probe_head(address, None).is_open
        assert probe_head(address, TOKEN).is_open
        assert probe_head(address, None).ray_version == "2.60.0"


def test_token_is_shown_to_no_one_who_is_no_head() -> None:
    class Another(FakeHead):
        def service(self, details: Any) -> Any:
            super().service(details)
            return None

    handler = Another(None)
    with listening(handler) as address:
        facts = probe_head(address, TOKEN)
    assert facts.without_token is Answer.OTHER
    assert handler.seen == [None]


def test_nobody_there_says_why(free_port: int) -> None:
    facts = probe_head(f"127.0.0.1:{free_port}", TOKEN)
    assert (facts.without_token, facts.reason) == (Answer.NONE, "Connection refused")
    assert probe_head("no-such-host.invalid:6379", None).without_token is Answer.NONE


def test_who_takes_connections_and_never_answers_is_left_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        facts = probe_head(f"127.0.0.1:{listener.getsockname()[1]}", TOKEN, timeout_s=0.3)
    assert facts.without_token is not Answer.TAKEN
    assert facts.with_token is None


def test_other_protocol_is_no_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(3):
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        facts = probe_head(f"127.0.0.1:{listener.getsockname()[1]}", TOKEN, timeout_s=2.0)
    assert facts.without_token in (Answer.OTHER, Answer.NONE)
    assert facts.with_token is None
