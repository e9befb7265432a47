"""Keys: where they come from, and that no spelling of a request gets around them."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway.errors import FileUnusable, KeysRefused
from gateway.http import api_keys
from gateway.http.api_keys import (
    KEYS_VARIABLE,
    KeyRing,
    client_key,
    keys_of_environment,
    keys_of_option,
    read_key_file,
)
from tests.gateway.fake_router import FakeRouter, app_over, http_client, script, stories_tokenizer

KEY, OTHER = "sk-canary-1234567890", "sk-second"
KEYS = KeyRing.of([OTHER, KEY])
BODY = b'{"model": "stories", "prompt": "hello"}'
Headers = Iterable[tuple[bytes, bytes]]


@functools.cache
def _app() -> FastAPI:
    return app_over(FakeRouter(script(stories_tokenizer().encode("A story."))), keys=KEYS)


def _ask(
    raw_path: bytes,
    path: str,
    method: str = "GET",
    headers: Headers = (),
    root_path: str = "",
) -> tuple[int, dict[bytes, bytes], bool]:
    """Status and headers of an answer to a scope as a server would make it, and whether the body was asked for."""
    sent: list[Any] = []
    was_read = False

    async def receive() -> Any:
        nonlocal was_read
        if was_read:
            await asyncio.Event().wait()
        was_read = True
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": raw_path,
        "root_path": root_path,
        "query_string": b"",
        "headers": [(b"host", b"gateway"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(_app()(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), was_read


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "PUT", "TRACE", "PROPFIND"])
@pytest.mark.parametrize(
    ("raw_path", "path"),
    [
        (b"/v1/models", "/v1/models"),
        (b"/v1/completions", "/v1/completions"),
        (b"/v1/%63ompletions", "/v1/completions"),
        (b"//v1/models", "//v1/models"),
        (b"/v1/models/", "/v1/models/"),
        (b"/health/../v1/models", "/health/../v1/models"),
        (b"/health/..%2fv1/models", "/health/../v1/models"),
        (b"/health/%2e%2e/v1/models", "/health/../v1/models"),
        (b"/health/", "/health/"),
        (b"//health", "//health"),
        (b"/%68ealth", "/health"),
        (b"/health%00", "/health\0"),
        (b"/health", "/v1/models"),
        (b"/v1/models", "/health"),
        (b"/health;/v1/models", "/health;/v1/models"),
        (b"/HEALTH", "/HEALTH"),
        (b"http://gateway/v1/models", "http://gateway/v1/models"),
        (b"http://gateway/health", "http://gateway/health"),
        (b"*", "*"),
        (b"", ""),
        (b"/metrics", "/metrics"),
        (b"/ready", "/ready"),
        (b"/sage/status", "/sage/status"),
        (b"/openapi.json", "/openapi.json"),
    ],
)
def test_no_spelling_of_a_path_passes_without_a_key(raw_path: bytes, path: str, method: str) -> None:
    status, headers, was_read = _ask(raw_path, path, method)
    assert status == 401
    assert headers[b"www-authenticate"] == b"Bearer"
    assert not was_read


@pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE"])
def test_health_is_open_to_reading_only(method: str) -> None:
    assert _ask(b"/health", "/health")[0] == 200
    assert _ask(b"/health", "/health", "HEAD")[0] == 405
    assert _ask(b"/health", "/health", method)[0] == 401


def test_mounted_elsewhere_health_is_not_taken_for_another_route() -> None:
    assert _ask(b"/health", "/health", root_path="/health")[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"localhost"), (b"x-forwarded-for", b"127.0.0.1")],
        [(b"host", b"127.0.0.1/health"), (b"x-original-url", b"/health"), (b"x-rewrite-url", b"/health")],
        [(b"x-http-method-override", b"GET")],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Basic " + KEY.encode())],
        [(b"authorization", b"Bearer " + KEY.encode() + b"x")],
        [(b"authorization", b"Bearer " + KEY[:-1].encode())],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer " + KEY.encode() + b", Bearer x")],
        [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer " + KEY.encode())],
        [(b"authorization", b"Bearer " + KEYS.digests[0])],
        [(b"authorization", b"Bearer " + KEYS.digests[0].hex().encode())],
        [(b"api-key", KEY.encode())],
        [(b"cookie", b"authorization=Bearer " + KEY.encode())],
        [(b"origin", b"http://gateway"), (b"access-control-request-method", b"POST")],
    ],
)
def test_no_header_stands_in_for_a_key(headers: list[tuple[bytes, bytes]]) -> None:
    for method in ("GET", "OPTIONS"):
        assert _ask(b"/v1/models", "/v1/models", method, headers)[0] == 401


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {OTHER}", f"BEARER  {KEY} "])
def test_each_key_opens_every_route(value: str) -> None:
    header = [(b"authorization", value.encode())]
    for path in ("/v1/models", "/ready", "/metrics", "/sage/status"):
        assert _ask(path.encode(), path, headers=header)[0] == 200
    assert _ask(b"/v1/completions", "/v1/completions", "POST", header)[0] == 200


def test_refusal_has_openai_s_shape_and_tells_no_key(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> httpx.Response:
        async with http_client(_app()) as client:
            wrong = {"Authorization": "Bearer sk-wrong-canary"}
            return await client.post("/v1/completions", content=BODY, headers=wrong)

    with caplog.at_level(logging.DEBUG):
        answer = asyncio.run(run())
    assert answer.json()["error"] == {
        "message": "Incorrect API key provided.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert answer.headers["x-request-id"]
    assert "canary" not in answer.text + caplog.text


def test_comparison_goes_on_after_the_key_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    original = api_keys.hmac.compare_digest
    monkeypatch.setattr(api_keys.hmac, "compare_digest", lambda a, b: compared.append(a) or original(a, b))
    ring = KeyRing.of(["a", "b", "c"])
    assert ring.knows(b"a")
    assert compared == list(ring.digests)
    assert all(len(digest) == 32 for digest in compared)


def test_websocket_is_closed_unanswered() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "raw_path": b"/health", "headers": []}
    asyncio.run(_app()(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_ring_shows_and_holds_no_key() -> None:
    assert repr(KEYS) == "<2 keys>"
    assert KEY not in repr(vars(KEYS))
    assert len(KeyRing.of([KEY, KEY])) == 1
    assert not KeyRing()


def _key_file(tmp_path: Path, content: bytes, mode: int = 0o600) -> str:
    path = tmp_path / "keys"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_key_file_has_one_key_a_line_and_comments(tmp_path: Path) -> None:
    path = _key_file(tmp_path, f"# ours\n\n  {KEY}\r\n#{OTHER}\n{OTHER}\n".encode(), 0o640)
    assert read_key_file(path) == keys_of_option(f"@{path}") == [KEY, OTHER]


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (KEY.encode(), 0o604, "chmod 600"),
        (KEY.encode(), 0o602, "chmod 600"),
        (KEY.encode(), 0o666, "chmod 600"),
        (b"# none\n\n", 0o600, "holds no keys"),
        (f"{KEY} {OTHER}".encode(), 0o600, "line 1 holds a key that is not"),
        (f"\n{KEY}é".encode(), 0o600, "line 2 holds a key"),
        (b"x" * 513, 0o600, "1 to 512 visible"),
        (b"\xff" + KEY.encode(), 0o600, "not UTF-8"),
        (b"#" * (1024 * 1024 + 1), 0o600, "larger than"),
    ],
)
def test_key_file_that_cannot_be_used_is_refused_without_showing_keys(
    tmp_path: Path, content: bytes, mode: int, message: str
) -> None:
    with pytest.raises((KeysRefused, FileUnusable), match=message) as caught:
        read_key_file(_key_file(tmp_path, content, mode))
    assert "canary" not in str(caught.value)


def test_key_file_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, message in (
        ("pipe", "no regular file"),
        (".", "no regular file"),
        ("absent", "cannot be read"),
    ):
        with pytest.raises(FileUnusable, match=message):
            read_key_file(str(tmp_path / name))


def test_client_sends_the_option_s_key_before_the_environment_s() -> None:
    environment = {KEYS_VARIABLE: f" {OTHER},{KEY}\n"}
    assert keys_of_environment(environment) == [OTHER, KEY]
    assert client_key(None, environment) == OTHER
    assert client_key(KEY, environment) == KEY
    assert client_key(None, {}) is None
