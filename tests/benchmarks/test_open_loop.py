"""The load client against a small server of its own, and what it counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.open_loop import Load, Outcome, arrivals, percentiles, run_load, summarise
from benchmarks.sse_client import Answer, NotLoopback, RequestFailed, stream_completion

HOST = "127.0.0.1"


def chunked(*parts: bytes) -> bytes:
    """A body cut into chunks wherever it pleases the server."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def event(text: str | None, tokens: int | None = None) -> bytes:
    body = {
        "choices": [] if text is None else [{"text": text}],
        "usage": None if tokens is None else {"completion_tokens": tokens},
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[int]:
    """Says the same to everybody. Yields its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, HOST, 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


STREAM = event("Once ") + event("upon") + event(None, 2) + b"data: [DONE]\n\n"
GOOD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(
    STREAM[:17], STREAM[17:60], STREAM[60:]
)
BUSY = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy"
CUT_OFF = b"HTTP/1.1 200 OK\r\n\r\n" + event("Once ")


def test_events_cut_across_chunks_are_put_together_again() -> None:
    async def ask() -> Answer:
        async with server(GOOD) as port:
            return await stream_completion(HOST, port, {"prompt": "x"})

    answer = asyncio.run(ask())
    assert (answer.text, answer.num_tokens, len(answer.event_at)) == ("Once upon", 2, 2)
    assert 0 < answer.first_s <= answer.last_s


def test_an_answer_that_is_cut_off_is_a_failure_and_no_answer() -> None:
    async def ask() -> Answer:
        async with server(CUT_OFF) as port:
            return await stream_completion(HOST, port, {"prompt": "x"})

    with pytest.raises(RequestFailed, match="ended early"):
        asyncio.run(ask())


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "localhost", ""])
def test_no_load_is_sent_to_other_machines(host: str) -> None:
    load = Load(rate=1.0, seconds=1.0, max_tokens=1, seed=0)
    with pytest.raises(NotLoopback):
        asyncio.run(run_load(host, 8000, "m", "x", load))


def test_refusals_are_counted_beside_answers() -> None:
    async def load(answer: bytes) -> Outcome:
        async with server(answer) as port:
            return await run_load(HOST, port, "m", "x", Load(rate=200.0, seconds=0.1, max_tokens=2, seed=1))

    expected = len(list(arrivals(Load(200.0, 0.1, 2, 1))))
    good, busy = asyncio.run(load(GOOD)), asyncio.run(load(BUSY))
    assert len(good.answers) == expected and not good.refused
    assert busy.refused == {"HTTP 429": expected} and not busy.answers
    assert summarise(good)["tokens_per_s"] == pytest.approx(2 * expected / good.seconds)


def test_arrivals_have_the_rate_that_was_asked_for_and_do_not_change() -> None:
    load = Load(rate=20.0, seconds=50.0, max_tokens=1, seed=3)
    times = list(arrivals(load))
    assert times == list(arrivals(load)) == sorted(times)
    assert times[-1] < 50.0
    assert 900 < len(times) < 1100  # 1,000 expected, three standard deviations are 95


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1.0), (1.0, 301.0), (100.0, 21.0), (-1.0, 1.0)])
def test_load_out_of_bounds_is_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"at most|more than"):
        Load(rate, seconds, 1, 0)


def test_percentiles_are_milliseconds() -> None:
    assert percentiles([i / 1000 for i in range(101)]) == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
    assert percentiles([0.25]) == {"p50": 250, "p90": 250, "p99": 250}
    assert percentiles([]) == {}
