"""`sage` in requests and answers, over a real engine: what may be asked for, and what an answer says of itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.http.routing_rules import RoutingRules
from router.loading import EngineOptions, LoadedEngine
from tests.engines import open_engine
from tests.gateway.fake_router import stories_tokenizer
from tests.one_process import http_service

BODY = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "stories", "messages": [{"role": "user", "content": "Tell"}], "max_tokens": 3}
TOKENIZER = stories_tokenizer()
OPEN = RoutingRules(allowed_policies=("snarc",), allowed_efforts=("wake", "crisis", "auto"))
Ask = Callable[..., list[httpx.Response]]


@pytest.fixture(scope="module")
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions())
    yield loaded
    loaded.close()


@pytest.fixture
def ask(stories_store: Path, loaded: LoadedEngine) -> Ask:
    """Answers to several bodies, one after another, from one service."""

    def run(*bodies: dict[str, Any], rules: RoutingRules = OPEN, feedback: float | None = None) -> Any:
        async def post() -> list[httpx.Response]:
            answers = []
            async with http_service(stories_store, loaded, TOKENIZER, routing=rules) as client:
                for body in bodies:
                    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                    answers.append(await client.post(path, json=body))
                    if feedback is not None:
                        score = {"request_id": answers[-1].json()["id"], "score": feedback}
                        answers.append(await client.post("/v1/feedback", json=score))
                return answers

        return asyncio.run(post())

    return run


def _sage(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json()["sage"])


def test_native_answer_is_exact_and_says_nothing_more(ask: Ask) -> None:
    for body in (BODY, {**BODY, "sage": {}}, {**BODY, "sage": {"policy": "native", "effort": "focus"}}):
        assert set(_sage(ask(body)[0])) == {"quality", "timings"}
        assert _sage(ask(body)[0])["quality"] == "exact"


@pytest.mark.parametrize("body", [BODY, CHAT])
def test_modified_answer_tells_policy_effort_k_and_misses(ask: Ask, body: dict[str, Any]) -> None:
    sage = _sage(ask({**body, "sage": {"policy": "snarc", "effort": "wake"}})[0])
    assert sage["quality"] == "modified" and sage["policy"] == "snarc"
    assert sage["effort"] == "WAKE (k=4, reduced)" and sage["k"] == 4
    assert 0 <= sage["misses"] <= sage["expert_uses"]
    (tokens,) = sage["tokens_at"].values()
    assert sage["expert_uses"] == tokens * 4 * 6


def test_several_choices_are_described_together(ask: Ask) -> None:
    alone = _sage(ask({**BODY, "sage": {"effort": "crisis"}})[0])
    together = _sage(ask({**BODY, "n": 3, "sage": {"effort": "crisis"}})[0])
    assert together["expert_uses"] == 3 * alone["expert_uses"]
    assert together["effort"] == "CRISIS (k=16)"


@pytest.mark.parametrize("has_usage", [False, True])
def test_streamed_answer_says_it_in_its_last_chunk(ask: Ask, has_usage: bool) -> None:
    stream = {"stream": True} | ({"stream_options": {"include_usage": True}} if has_usage else {})
    for body, quality in (({**BODY, "n": 2, "sage": {"policy": "snarc"}}, "modified"), (BODY, "exact")):
        lines = ask({**body, **stream})[0].text.splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert all("sage" not in chunk for chunk in chunks[:-1])
        if quality == "modified" or has_usage:
            assert chunks[-1]["sage"]["quality"] == quality
        else:
            assert "sage" not in chunks[-1]
        assert has_usage or chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_answer_that_a_stop_string_ended_is_described_too(ask: Ask) -> None:
    sage = _sage(ask({**BODY, "max_tokens": 40, "stop": ["e"], "sage": {"policy": "snarc"}})[0])
    assert sage["quality"] == "modified" and sage["expert_uses"] > 0


def test_explanation_has_every_token_and_layer(ask: Ask) -> None:
    answer = ask({**BODY, "sage": {"policy": "snarc", "explain": True}})[0].json()
    (explained,) = answer["sage"]["explain"]
    num_tokens = answer["usage"]["total_tokens"] - 1  # the last token is not computed further
    assert [token["position"] for token in explained["tokens"]] == list(range(num_tokens))
    for token in explained["tokens"]:
        assert [layer["layer"] for layer in token["layers"]] == list(range(6))
        for layer in token["layers"]:
            assert len(layer["experts"]) == 8
            names = {"expert", "weight", "gate", "salience", "trust", "warmth", "stood_in"}
            assert set(layer["experts"][0]) == names
            assert set(layer["signals"]) == {"surprise", "novelty", "arousal", "reward", "conflict"}
    assert explained["is_cut"] is False


def test_explained_native_answer_stays_exact(ask: Ask) -> None:
    plain, explained = ask(BODY, {**BODY, "sage": {"explain": True}})
    assert explained.json()["choices"] == plain.json()["choices"]
    assert _sage(explained)["quality"] == "exact" and _sage(explained)["explain"]


@pytest.mark.parametrize(
    ("sage", "param", "allowed"),
    [
        ({"policy": "snarc"}, "sage.policy", "allowed: native."),
        ({"effort": "crisis"}, "sage.effort", "allowed: focus, wake."),
    ],
)
def test_what_the_service_does_not_allow_is_refused_by_name(
    ask: Ask, sage: dict[str, Any], param: str, allowed: str
) -> None:
    response = ask({**BODY, "sage": sage}, rules=RoutingRules(allowed_efforts=("wake",)))[0]
    assert response.status_code == 403
    error = response.json()["error"]
    assert error["param"] == param and error["code"] == "routing_not_allowed"
    assert allowed in error["message"]


def test_service_default_applies_and_native_may_be_asked_for(ask: Ask) -> None:
    rules = RoutingRules("snarc", "crisis")
    by_default, asked = ask(BODY, {**BODY, "sage": {"policy": "native", "effort": "focus"}}, rules=rules)
    assert _sage(by_default)["effort"] == "CRISIS (k=16)"
    assert _sage(asked)["quality"] == "exact"


@pytest.mark.parametrize(
    ("sage", "param", "wanted"),
    [
        ({"policy": "fast"}, "sage.policy", "must be native or snarc."),
        ({"effort": "FOCUS"}, "sage.effort", "must be wake, focus, crisis or auto."),
        ({"explain": 1}, "sage.explain", "must be true or false."),
        ({"k": 3}, "sage.k", "is no field here; fields are policy, effort, explain, max_speech_frames."),
        ([], "sage", "must be an object with policy"),
    ],
)
def test_unknown_values_and_fields_are_refused(ask: Ask, sage: object, param: str, wanted: str) -> None:
    response = ask({**BODY, "sage": sage})[0]
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param
    assert f"Invalid value for {param}: {wanted}" in error["message"]


def test_feedback_becomes_the_reward_of_later_requests(ask: Ask) -> None:
    body = {**BODY, "sage": {"policy": "snarc", "explain": True}}
    first, fed, second, _ = ask(body, body, feedback=0.5)
    assert fed.status_code == 200 and fed.json()["score"] == 0.5

    def rewards(response: httpx.Response) -> set[float]:
        (explained,) = _sage(response)["explain"]
        return {layer["signals"]["reward"] for token in explained["tokens"] for layer in token["layers"]}

    assert rewards(second) == {0.75} != rewards(first)
