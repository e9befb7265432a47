"""Too many requests, bodies that trickle in, clients that read nothing, and pages of other origins."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.errors import ApiError
from gateway.http import server as server_module
from gateway.http.admission import SPARE_REQUESTS, Admission
from gateway.http.api_keys import KeyRing
from gateway.http.connection import EventStream
from gateway.http.request_limits import read_body
from gateway.http.server import HttpServer
from gateway.http.settings import RequestLimits
from gateway.http.stalled_clients import StallGuard
from tests.gateway.fake_router import MODEL, FakeRouter, Step, app_over, http_client, script

COMPLETION = {"model": MODEL, "prompt": "hello"}
ORIGIN = "https://chat.example"


@contextmanager
def _served(app: ASGIApp) -> Iterator[int]:
    """The app behind uvicorn. Yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    content = b""
    while chunk := connection.recv(65536):
        content += chunk
    return content


def _client_that_reads_nothing(port: int, path: bytes = b"/") -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET %b HTTP/1.1\r\nhost: gateway\r\n\r\n" % path)
    return client


def test_request_beyond_the_limit_gets_429_before_its_body_and_others_go_on() -> None:
    async def run() -> tuple[list[httpx.Response], httpx.Response, int]:
        router = FakeRouter([Step(hangs=True)])
        app = app_over(router, max_open_requests=2)
        async with http_client(app) as client:
            open_ = [asyncio.create_task(client.post("/v1/completions", json=COMPLETION)) for _ in range(2)]
            while len(router.requests) < 2:
                await asyncio.sleep(0.001)
            refused = [await client.post("/v1/completions", content=b"no JSON") for _ in range(20)]
            status = await client.get("/ready")
            for task in open_:
                task.cancel()
            await asyncio.gather(*open_, return_exceptions=True)
            router.script = script([5])
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
            return refused, status, len(router.requests)

    refused, status, num_asked = asyncio.run(run())
    assert {answer.status_code for answer in refused} == {429}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert status.status_code == 200
    assert num_asked == 3


def test_beyond_all_generations_there_is_room_for_other_requests_and_not_without_end() -> None:
    admission, max_generations = Admission(2), 2
    with ExitStack() as open_:
        for _ in range(max_generations):
            open_.enter_context(admission.entered("POST"))
        with pytest.raises(ApiError) as refused, admission.entered("POST"):
            pass
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1.0)
        for _ in range(max_generations + SPARE_REQUESTS):
            open_.enter_context(admission.entered("GET"))
        for method in ("GET", "POST"):
            with pytest.raises(ApiError) as refused, admission.entered(method):
                pass
            assert (refused.value.status, refused.value.code) == (503, "unavailable")
            assert refused.value.retry_after_s == 1.0
    assert (admission.num_generations, admission.num_requests) == (0, 0)
    with admission.entered("POST"):
        pass


@pytest.mark.parametrize("is_begun", [False, True])
def test_request_that_takes_too_long_is_ended_with_408_where_nothing_was_sent(is_begun: bool) -> None:
    router = FakeRouter([Step((5,)), Step(hangs=True)] if is_begun else [Step(hangs=True)])
    body = json.dumps(COMPLETION | {"stream": is_begun})
    with (
        _served(app_over(router, request_timeout_s=0.3)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20.0) as client,
    ):
        head = f"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall((head + body).encode())
        answer = _read_all(client)
    if is_begun:
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert not answer.endswith(b"0\r\n\r\n")  # cut, which no client takes for its end
    else:
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"timeout"' in answer
    assert len(router.cancelled) == 1


def test_body_that_trickles_gets_408_and_the_connection_is_closed() -> None:
    limits = RequestLimits(body_grace_s=0.3)
    with (
        _served(app_over(FakeRouter(), limits=limits)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20.0) as client,
    ):
        head = f"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: 1000\r\n\r\n{'{'}"
        client.sendall(head.encode())
        answer = _read_all(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer.lower()
    assert b'"code":"body_timeout"' in answer


async def _chunks(num_chunks: int, num_bytes: int, pause_s: float) -> AsyncIterator[bytes]:
    for _ in range(num_chunks):
        await asyncio.sleep(pause_s)
        yield b"x" * num_bytes


def test_body_gets_more_time_the_more_of_it_has_come() -> None:
    limits = RequestLimits(body_grace_s=1.0, min_body_bytes_per_s=1000.0)
    steady = asyncio.run(read_body(_chunks(30, 200, 0.05), None, limits))
    assert len(steady) == 6000
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_body(_chunks(100, 1, 0.05), None, limits))
    assert caught.value.status == 408


def test_one_byte_a_second_is_closed_within_ten_seconds() -> None:
    """The default limits, by their arithmetic: such a body has so many bytes after the grace, and then so much
    longer."""
    limits = RequestLimits()
    num_bytes = limits.body_grace_s + 1
    assert limits.body_grace_s + num_bytes / limits.min_body_bytes_per_s < 10.0


@pytest.mark.parametrize("origins", [(ORIGIN,), ("*",)])
def test_page_of_a_chosen_origin_asks_beforehand_and_calls_with_its_key(origins: tuple[str, ...]) -> None:
    async def run() -> None:
        app = app_over(FakeRouter(script([5])), keys=KeyRing.of(["k"]), cors_origins=origins)
        async with http_client(app) as client:
            asked = {
                "Origin": ORIGIN,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
            }
            preflight = await client.options("/v1/completions", headers=asked)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == origins[0]
            assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
            assert "access-control-allow-credentials" not in preflight.headers
            refused = await client.post("/v1/completions", json=COMPLETION, headers={"Origin": ORIGIN})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == origins[0]
            with_key = {"Origin": ORIGIN, "Authorization": "Bearer k"}
            answer = await client.post("/v1/completions", json=COMPLETION, headers=with_key)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origins[0]

    asyncio.run(run())


@pytest.mark.parametrize("origin", ["https://other.example", "http://chat.example", f"{ORIGIN}:444", "null"])
def test_page_of_another_origin_is_refused(origin: str) -> None:
    async def run() -> None:
        app = app_over(FakeRouter(), keys=KeyRing.of(["k"]), cors_origins=(ORIGIN,))
        async with http_client(app) as client:
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            preflight = await client.options("/v1/completions", headers=asked)
            assert preflight.status_code == 400
            assert "access-control-allow-origin" not in preflight.headers
            plain = await client.options("/v1/models", headers={"Origin": ORIGIN})
            assert plain.status_code == 401

    asyncio.run(run())


def test_client_that_reads_nothing_is_cut_off_and_the_app_is_told() -> None:
    ended = threading.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(10_000):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        finally:
            ended.set()

    with _served(StallGuard(app, stall_s=0.3)) as port, _client_that_reads_nothing(port) as client:
        assert ended.wait(20.0)
        with pytest.raises(ConnectionResetError):  # cut off, not closed after what was buffered
            _read_all(client)


def test_client_that_reads_slowly_but_steadily_gets_everything() -> None:
    app = FastAPI()

    @app.get("/")
    async def page() -> dict[str, Any]:
        return {"text": "x" * 2_000_000}

    with _served(StallGuard(app, stall_s=5.0)) as port, socket.socket() as client:
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET / HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n")
        num_bytes = 0
        while chunk := client.recv(262144):
            num_bytes += len(chunk)
            time.sleep(0.005)
    assert num_bytes > 2_000_000


def _in_pieces(*sizes: int) -> ASGIApp:
    """Answers with pieces of so many bytes."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, num_bytes in enumerate(sizes, 1):
            is_more = number < len(sizes)
            await send({"type": "http.response.body", "body": b"x" * num_bytes, "more_body": is_more})

    return app


@pytest.mark.parametrize("sizes", [(20_000_000,), (5, 20_000_000)])
def test_server_stops_though_a_client_takes_nothing_of_the_rest_of_its_answer(
    sizes: tuple[int, ...], free_port: int
) -> None:
    async def run() -> None:
        server = HttpServer(_in_pieces(*sizes), stall_s=0.3)
        await server.start("127.0.0.1", free_port)
        with _client_that_reads_nothing(free_port) as client:
            await asyncio.sleep(0.1)
            await asyncio.wait_for(server.stop(), 10.0)
            with pytest.raises(ConnectionResetError):
                _read_all(client)

    asyncio.run(run())


def _read_slowly(port: int) -> int:
    """The number of bytes of an answer of which there is always some more to take. Takes 2.4 s for 40 MB."""
    num_bytes = 0
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: gateway\r\n\r\n")
        while chunk := client.recv(1_000_000, socket.MSG_WAITALL):
            num_bytes += len(chunk)
            time.sleep(0.06)
    return num_bytes


def test_server_that_stops_lets_a_slow_client_take_the_rest_of_its_answer(free_port: int) -> None:
    async def run() -> None:
        server = HttpServer(_in_pieces(40_000_000), stall_s=1.2)
        await server.start("127.0.0.1", free_port)
        reading = asyncio.create_task(asyncio.to_thread(_read_slowly, free_port))
        await asyncio.sleep(0.2)
        await asyncio.wait_for(server.stop(), 10.0)
        assert await reading > 40_000_000

    asyncio.run(run())


def test_server_goes_on_stopping_where_nobody_waits_for_it_any_more(free_port: int) -> None:
    async def run() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            begun.set()
            await may_end.wait()
            await _in_pieces(5)(scope, receive, send)

        server = HttpServer(app)
        await server.start("127.0.0.1", free_port)
        answer = asyncio.create_task(_get(free_port))
        await begun.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.stop(), 0.2)
        assert server.is_serving
        may_end.set()
        assert (await answer).content == b"xxxxx"
        await asyncio.wait_for(server.stop(), 10.0)

    asyncio.run(run())


@pytest.mark.parametrize(
    "request_", [b"no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"]
)
def test_what_strangers_send_is_not_in_the_log(
    request_: bytes, free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)

    async def run() -> None:
        server = HttpServer(_in_pieces(5))
        await server.start("127.0.0.1", free_port)
        reader, writer = await asyncio.open_connection("127.0.0.1", free_port)
        writer.write(request_)
        assert await reader.read(5) == b"HTTP/"
        writer.close()
        await server.stop()

    asyncio.run(run())
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_client_that_reads_nothing_is_counted_and_logged_as_one_that_has_gone(
    free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    app = app_over(FakeRouter())

    @app.get("/stream")
    async def stream() -> EventStream:
        return EventStream(_events(), "a-request")

    async def _events() -> AsyncGenerator[bytes, None]:
        for _ in range(1_000):
            yield b"x" * 65536
            await asyncio.sleep(0)  # as for a token

    async def run() -> str:
        server = HttpServer(app, stall_s=0.3)
        await server.start("127.0.0.1", free_port)
        with _client_that_reads_nothing(free_port, b"/stream"):
            while not caplog.records:
                await asyncio.sleep(0.05)
        async with httpx.AsyncClient(timeout=20.0) as client:
            text = (await client.get(f"http://127.0.0.1:{free_port}/metrics")).text
        await server.stop()
        return text

    text = asyncio.run(asyncio.wait_for(run(), 20.0))
    assert 'requests_total{route="/stream",status="499"} 1.0' in text
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [("INFO", "a client took nothing for 0.3 s and is cut off")]


async def _get(port: int) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20.0) as client:
        return await client.get(f"http://127.0.0.1:{port}/")


def test_server_that_stops_finishes_the_answers_that_have_begun_and_takes_no_more(free_port: int) -> None:
    async def run() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()
        app = FastAPI()

        @app.get("/")
        async def page() -> dict[str, str]:
            begun.set()
            await may_end.wait()
            return {"text": "whole"}

        server = HttpServer(app)
        await server.start("127.0.0.1", free_port)
        assert server.is_serving
        answer = asyncio.create_task(_get(free_port))
        await begun.wait()
        stopping = asyncio.create_task(server.stop())
        while True:
            try:
                socket.create_connection(("127.0.0.1", free_port)).close()
            except ConnectionRefusedError:
                break
            await asyncio.sleep(0.01)
        assert not stopping.done()
        may_end.set()
        assert (await answer).json() == {"text": "whole"}
        await asyncio.wait_for(stopping, 10.0)
        assert not server.is_serving

    asyncio.run(run())


def test_server_waits_for_a_port_that_its_predecessor_still_has(free_port: int) -> None:
    async def run() -> None:
        before, after = HttpServer(FastAPI()), HttpServer(FastAPI())
        await before.start("127.0.0.1", free_port)
        starting = asyncio.create_task(after.start("127.0.0.1", free_port))
        await asyncio.sleep(0.3)
        assert not starting.done()
        await before.stop()
        await asyncio.wait_for(starting, 10.0)
        assert (await _get(free_port)).status_code == 404
        await after.stop()

    asyncio.run(run())


def test_server_says_that_its_port_is_taken_for_good(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BIND_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(OSError, match="in use"):
        asyncio.run(HttpServer(FastAPI()).start("127.0.0.1", free_port))
