"""What an answer says when experts of another numerics class took part in it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.gateway.fake_router import FakeRouter, Step, app_over, http_client

BODY = {"model": "stories", "prompt": "Once", "max_tokens": 4}
CHAT = {"model": "stories", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}
SCRIPT = (Step((5,)), Step((6,), is_mixed=True), Step((7,), "length"))
"""An answer whose second event is marked; an engine would mark the third too."""


def _ask(body: dict[str, Any], script: tuple[Step, ...] = SCRIPT) -> str:
    async def ask() -> str:
        async with http_client(app_over(FakeRouter(script))) as client:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            return response.text

    return asyncio.run(ask())


def _chunks(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("body", [BODY, CHAT])
def test_plain_answer_says_mixed(body: dict[str, Any]) -> None:
    assert json.loads(_ask(body))["sage"]["numerics"] == "mixed"


@pytest.mark.parametrize("has_usage", [False, True])
def test_streamed_answer_says_it_in_its_last_chunk(has_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    chunks = _chunks(_ask({**BODY, "stream": True, **options}))
    assert chunks[-1]["sage"]["numerics"] == "mixed"
    assert all("sage" not in chunk for chunk in chunks[:-1])


def test_answer_of_one_class_says_nothing_of_it() -> None:
    plain = (Step((5,)), Step((6,), "length"))
    assert "numerics" not in json.loads(_ask(BODY, plain))["sage"]
    assert "sage" not in _chunks(_ask({**BODY, "stream": True}, plain))[-1]
