"""Tools in chats: offered in the template's way, called in the model's, answered in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from fastapi import FastAPI

from gateway.http.app import build_app
from gateway.http.tool_parser import ToolParser
from gateway.routers.pool import PoolLimits, RouterPool
from gateway.text.chat_template import ChatTemplate
from router.loading import EngineOptions, LoadedEngine
from tests.engines import open_engine, small_engine
from tests.gateway.fake_router import (
    MODEL,
    FakeRouter,
    app_over,
    http_client,
    script,
    settings,
    stories_tokenizer,
)
from tests.gateway.stepped_router import SteppedRouter

TOKENIZER = stories_tokenizer()
SOURCE = (
    "{% if tools %}<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}</tools>"
    'calls are <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>\n{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}\n{% endfor %}"
)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}
SEARCH: dict[str, Any] = {
    "type": "object",
    "properties": {"words": {"type": "string", "maxLength": 6}},
    "required": ["words"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "search": SEARCH}
ASKED: list[Any] = [{"role": "user", "content": "Weather?"}]


def _tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMAS[name], **more}}


TOOLS: list[Any] = [_tool("weather", description="Of a city."), _tool("search")]
BODY: dict[str, Any] = {"model": MODEL, "messages": ASKED, "tools": TOOLS, "max_tokens": 20}


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    made = ChatTemplate(SOURCE, TOKENIZER, {})
    yield made
    made.close()


@pytest.fixture(scope="module")
def loaded(stories_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(stories_store, EngineOptions())
    yield loaded
    loaded.close()


def _app(template: ChatTemplate, router: Any) -> FastAPI:
    return build_app(settings(context_length=768), TOKENIZER, template, router)


def _real(template: ChatTemplate, *links: SteppedRouter) -> FastAPI:
    pool = RouterPool({f"router-{index}": link for index, link in enumerate(links)}, PoolLimits(retry_s=0.0))
    return _app(template, pool)


def _link(loaded: LoadedEngine, num_steps: int | None = None) -> SteppedRouter:
    return SteppedRouter(small_engine(loaded, 90), num_steps)


def _post(app: FastAPI, body: dict[str, Any]) -> httpx.Response:
    async def run() -> httpx.Response:
        async with http_client(app) as client:
            return await client.post("/v1/chat/completions", json=body)

    return asyncio.run(run())


@asynccontextmanager
async def _official(app: FastAPI) -> Any:
    async with http_client(app) as http:
        transport: Any = http
        yield openai.AsyncOpenAI(
            api_key="k", base_url="http://gateway/v1", http_client=transport, max_retries=0
        )


def _written(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _said(text: str) -> FakeRouter:
    return FakeRouter(script(TOKENIZER.encode(text)))


def test_calls_that_the_model_writes_come_in_openais_shape(template: ChatTemplate) -> None:
    text = f"Let me see.\n{_written('weather', city='Rome')}\n{_written('search', words='é')}"
    router = _said(text)
    answer = _post(_app(template, router), BODY).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [call["type"] for call in calls] == ["function", "function"]
    assert all(call["id"].startswith("call_") for call in calls) and calls[0]["id"] != calls[1]["id"]
    assert [call["function"]["name"] for call in calls] == ["weather", "search"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Rome"}, {"words": "é"}]
    prompt = TOKENIZER.decode(router.requests[0].prompt_ids)
    assert '"description": "Of a city."' in prompt and prompt.count('"type": "function"') == 2
    assert router.requests[0].sampling.grammar is None


def test_official_client_gets_a_stream_of_calls(template: ChatTemplate) -> None:
    async def run() -> list[Any]:
        async with _official(_app(template, _said(f"Well. {_written('weather', city='Oslo')}"))) as client:
            stream = await client.chat.completions.create(**BODY, stream=True)
            return [chunk async for chunk in stream]

    choices = [chunk.choices[0] for chunk in asyncio.run(run())]
    assert "".join(choice.delta.content or "" for choice in choices) == "Well."
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or ()]
    assert {piece.index for piece in pieces} == {0}
    assert pieces[0].id and pieces[0].type == "function" and pieces[0].function.name == "weather"
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == {"city": "Oslo"}
    assert choices[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        "no call < at all <tool_cal",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call> and more',
        "<tool_call>\nnot JSON\n</tool_call>",
        '<tool_call>\n{"name": "weather", "argu',
        'Hello \n<tool_call>\n{"name": ["weather"], "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"days": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "\\ud83d"}}\n</tool_call>',
        f'<tool_call>\n{{"name": "weather", "arguments": {{"city": {"[" * 40}{"]" * 40}}}}}\n</tool_call>',
    ],
)
def test_what_is_no_call_stays_text(template: ChatTemplate, text: str) -> None:
    (choice,) = _post(_app(template, _said(text)), BODY).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]


def test_text_and_calls_do_not_depend_on_how_the_text_came() -> None:
    closing = 'a \\" </tool_call> b'
    text = f"a <b>\n {_written('f', x='</tool_call')}\n\n{_written('f', x=closing)}{_written('f')} tail  "

    def parsed(pieces: Sequence[str]) -> tuple[str, list[str]]:
        parser = ToolParser(["f"], lambda: "id")
        told = [parser.push(piece) for piece in pieces] + [parser.end()]
        return "".join(shown for shown, _ in told), [
            str(call.arguments) for _, calls in told for call in calls
        ]

    whole = parsed([text])
    assert whole == ("a <b>\ntail", [str({"x": "</tool_call"}), str({"x": closing}), "{}"])
    for size in (1, 2, 3, 7, 30):
        assert parsed([text[at : at + size] for at in range(0, len(text), size)]) == whole


@pytest.mark.parametrize(
    "mention", ["I use <tool_call> now.", 'a <tool_call> 5" wide </tool_call>', "<tool_call>\n{}"]
)
def test_call_after_a_mark_that_was_but_mentioned_is_a_call(template: ChatTemplate, mention: str) -> None:
    router = _said(f"{mention}\n{_written('weather', city='Rome')}")
    (choice,) = _post(_app(template, router), BODY).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert choice["message"]["content"] == mention


def test_one_call_is_all_where_calls_are_not_to_be_parallel(template: ChatTemplate) -> None:
    router = _said(_written("weather", city="Rome") + _written("search", words="a"))
    body = BODY | {"parallel_tool_calls": False}
    (choice,) = _post(_app(template, router), body).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("required", {"weather", "search"}),
        ({"type": "function", "function": {"name": "search"}}, {"search"}),
    ],
    ids=["required", "named"],
)
def test_required_calls_are_valid_whatever_is_drawn(
    template: ChatTemplate, loaded: LoadedEngine, choice: Any, allowed: set[str]
) -> None:
    app = _real(template, _link(loaded))
    for seed in range(6):
        body = BODY | {
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "seed": seed,
            "n": 2,
            "max_tokens": 200,
        }
        answer = _post(app, body)
        assert answer.status_code == 200, answer.text
        for found in answer.json()["choices"]:
            assert found["finish_reason"] == "tool_calls"
            (call,) = found["message"]["tool_calls"]
            assert call["function"]["name"] in allowed
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


def test_calls_whose_router_dies_are_the_calls(template: ChatTemplate, loaded: LoadedEngine) -> None:
    body = BODY | {"tool_choice": "required", "seed": 3, "max_tokens": 200, "parallel_tool_calls": False}

    def functions(*links: SteppedRouter) -> list[Any]:
        (choice,) = _post(_real(template, *links), body).json()["choices"]
        return [call["function"] for call in choice["message"]["tool_calls"]]

    whole = functions(_link(loaded))
    assert whole
    for num_steps in (1, 6, 17):
        assert functions(_link(loaded, num_steps), _link(loaded)) == whole


def test_strict_function_binds_a_call_that_the_model_begins(
    template: ChatTemplate, loaded: LoadedEngine
) -> None:
    """A bias makes a model begin one that never saw a tool."""
    grammar_of = _said("x")
    body = BODY | {"tools": [_tool("weather", strict=True), TOOLS[1]]}
    assert _post(_app(template, grammar_of), body).status_code == 200
    grammar = grammar_of.requests[0].sampling.grammar
    assert grammar is not None and loaded.engine.grammars is not None
    begun = TOKENIZER.encode('Well <tool_call>\n{"name": "wea')
    state = loaded.engine.grammars.begin(grammar, (0,), begun)
    allowed = torch.isfinite(state.allowed_only(torch.zeros(4096)))
    assert all("ther".startswith(TOKENIZER.decode([int(t)])[:4]) for t in allowed.nonzero().flatten())


def test_strict_call_that_is_to_be_the_only_one_ends_the_answer(
    template: ChatTemplate, loaded: LoadedEngine
) -> None:
    """Not the mark that a string of it holds."""
    router = _said("x")
    parameters = {
        "type": "object",
        "properties": {"words": {"const": "</tool_call>"}},
        "required": ["words"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "say", "parameters": parameters, "strict": True}}
    body = BODY | {"tools": [tool], "parallel_tool_calls": False}
    assert _post(_app(template, router), body).status_code == 200
    grammar = router.requests[0].sampling.grammar
    assert grammar is not None and loaded.engine.grammars is not None
    call = _written("say", words="</tool_call>")
    for text, is_complete in ((f"Well {call}", True), (f"Well {call[:-1]}", False), ("Well", False)):
        assert loaded.engine.grammars.begin(grammar, (0,), TOKENIZER.encode(text)).is_complete == is_complete
    (choice,) = _post(_app(template, _said(f"Well {call}")), body).json()["choices"]
    (written,) = choice["message"]["tool_calls"]
    assert json.loads(written["function"]["arguments"]) == {"words": "</tool_call>"}


def test_choice_none_offers_nothing(template: ChatTemplate) -> None:
    router = _said(_written("weather", city="Rome"))
    (choice,) = _post(_app(template, router), BODY | {"tool_choice": "none"}).json()["choices"]
    assert choice["message"]["content"] == _written("weather", city="Rome")
    assert "weather" not in TOKENIZER.decode(router.requests[0].prompt_ids)


def test_results_go_to_the_template_with_their_calls(template: ChatTemplate) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    router = _said("Sunny.")
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    assert _post(_app(template, router), BODY | {"messages": messages}).status_code == 200
    prompt = TOKENIZER.decode(router.requests[0].prompt_ids)
    assert prompt.endswith(f"assistant: {_written('weather', city='Rome')}tool: sun")


def _call(**changes: Any) -> list[Any]:
    function = {"name": "f", "arguments": "{}", **changes}
    return [
        *ASKED,
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]},
    ]


@pytest.mark.parametrize(
    ("changes", "param", "reason"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "item 0 must be an object"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "must have a name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "different names"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools", "object"),
        ({"tools": [TOOLS[1]] * 129}, "tools", "at most 128"),
        ({"tool_choice": "sometimes"}, "tool_choice", "must be none, auto, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "one of tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "only allowed with tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "where tools may be called"),
        ({"messages": _call(arguments="[1]")}, "messages.1.tool_calls", "JSON object"),
        ({"messages": _call(arguments="{")}, "messages.1.tool_calls", "not valid JSON"),
        ({"messages": _call(arguments="[" * 99)}, "messages.1.tool_calls", "deeper"),
        ({"messages": _call(name="<|im_end|>")}, "messages.1.tool_calls", "names of"),
        ({"messages": [*ASKED, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id", "needs one"),
        (
            {"messages": [*ASKED, {"role": "tool", "content": "x", "tool_call_id": "b"}]},
            "messages.1.tool_call_id",
            "must be the id of a call",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "bad", "parameters": {"minProperties": "x"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
            "function 'bad'",
        ),
    ],
)
def test_hostile_or_mistaken_fields_are_refused_by_name(
    template: ChatTemplate, changes: dict[str, Any], param: str, reason: str
) -> None:
    response = _post(_app(template, _said("x")), BODY | changes)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].content }}", "takes no tools"),
        ("{% if tools %}[TOOLS]{% endif %}", "does not write calls"),
    ],
)
def test_model_that_takes_no_tools_says_so(source: str, reason: str) -> None:
    template = ChatTemplate(source, TOKENIZER, {})
    error = _post(_app(template, _said("x")), BODY).json()["error"]
    template.close()
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert reason in error["message"]


def test_model_without_a_template_takes_no_tools() -> None:
    error = _post(app_over(_said("x")), BODY).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
