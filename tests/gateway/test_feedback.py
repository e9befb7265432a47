"""POST /v1/feedback as clients see it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from gateway.http.api_keys import KeyRing
from tests.gateway.fake_router import FakeRouter, app_over, http_client


def _post(body: Any, **changes: Any) -> tuple[httpx.Response, FakeRouter]:
    router = FakeRouter()

    async def post() -> httpx.Response:
        async with http_client(app_over(router, **changes)) as client:
            return await client.post("/v1/feedback", json=body)

    return asyncio.run(post()), router


def test_score_of_a_known_answer_reaches_the_router() -> None:
    response, router = _post({"request_id": "known", "score": -1})
    assert response.status_code == 200
    assert router.scores == [("known", -1.0)]


def test_unknown_answer_is_not_found() -> None:
    response, _ = _post({"request_id": "cmpl-0", "score": 1.0})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "answer_not_found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"request_id": "known"}, "score"),
        ({"score": 1.0}, "request_id"),
        ({"request_id": "", "score": 1.0}, "request_id"),
        ({"request_id": "x" * 129, "score": 1.0}, "request_id"),
        ({"request_id": 5, "score": 1.0}, "request_id"),
        ({"request_id": "known", "score": 1.01}, "score"),
        ({"request_id": "known", "score": "1"}, "score"),
        ({"request_id": "known", "score": True}, "score"),
        ({"request_id": "known", "score": 0.5, "why": "good"}, "why"),
    ],
)
def test_bad_feedback_is_refused_by_field(body: dict[str, Any], param: str) -> None:
    response, router = _post(body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert router.scores == []


def test_feedback_needs_the_key_like_every_route() -> None:
    response, router = _post({"request_id": "known", "score": 1.0}, keys=KeyRing.of(["secret-key"]))
    assert response.status_code == 401 and router.scores == []
