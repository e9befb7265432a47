"""Requests are checked field by field and nothing that matters is ignored."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.errors import ApiError
from gateway.http.field_policy import ignored_header
from gateway.http.openai_types import MAX_MESSAGES, ChatRequest, CompletionRequest, ignored_in, read_request

COMPLETION = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def _refusal(kind: type[CompletionRequest | ChatRequest], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_request(kind, body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        ([1, 2], ([1, 2],)),
        ([[1, 2]], ([1, 2],)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_prompt_forms_read_as_prompts(prompt: Any, expected: Any) -> None:
    assert read_request(CompletionRequest, {**COMPLETION, "prompt": prompt}).prompt == expected


@pytest.mark.parametrize(
    "prompt",
    [None, 5, "", [], [[]], [True], [1.5], [1, "a"], [[1, None]], {"a": 1}, ["a", [1]], ["a", ""], [[[1]]]],
)
def test_malformed_prompt_is_refused(prompt: Any) -> None:
    assert _refusal(CompletionRequest, {**COMPLETION, "prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("model", 5, "a string"),
        ("max_tokens", 0, "0 with echo"),
        ("max_tokens", 2**31, "from 1"),
        ("max_tokens", 10**4000, "from 1"),
        ("max_tokens", "5", "from 1"),
        ("max_tokens", True, "from 1"),
        ("max_tokens", 1.5, "from 1"),
        ("temperature", -0.1, "from 0 to 2"),
        ("temperature", 2.1, "from 0 to 2"),
        ("temperature", float("inf"), "from 0 to 2"),
        ("temperature", "1", "from 0 to 2"),
        ("temperature", False, "from 0 to 2"),
        ("top_p", 1.01, "from 0 to 1"),
        ("top_k", -1, "from 0"),
        ("min_p", 2, "from 0 to 1"),
        ("seed", 2**64, "64 bits"),
        ("seed", -(2**63) - 1, "64 bits"),
        ("n", 0, "from 1 to 128"),
        ("n", 129, "from 1 to 128"),
        ("n", 10**400, "from 1 to 128"),
        ("prompt", ["a"] * 129, "at most 128"),
        ("best_of", 2, "equal to n"),
        ("logprobs", -1, "from 0 to 20"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", True, "from 0 to 20"),
        ("echo", 1, "true or false"),
        ("ignore_eos", "no", "true or false"),
        ("min_tokens", -1, "from 0 to max_tokens"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("presence_penalty", 10**400, "from -2 to 2"),
        ("frequency_penalty", False, "from -2 to 2"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("repetition_penalty", -1.0, "from 0.01 to 100"),
        ("logit_bias", {"5": 101}, "-100 to 100"),
        ("logit_bias", {"5": 10**400}, "-100 to 100"),
        ("logit_bias", {"5": "1"}, "-100 to 100"),
        ("logit_bias", {"5": True}, "-100 to 100"),
        ("logit_bias", {"-5": 1}, "-100 to 100"),
        ("logit_bias", {"05": 1}, "-100 to 100"),
        ("logit_bias", {"9" * 5000: 1}, "-100 to 100"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024"),
        ("logit_bias", [], "-100 to 100"),
        ("stop_token_ids", [-1], "at most 128 token ids"),
        ("stop_token_ids", [True], "at most 128 token ids"),
        ("stop_token_ids", [1] * 129, "at most 128 token ids"),
        ("stop_token_ids", 5, "at most 128 token ids"),
        ("stream", "yes", "true or false"),
        ("stream_options", [], "an object"),
        ("stop", "", "1 to 4 strings"),
        ("stop", ["a"] * 5, "1 to 4 strings"),
        ("stop", ["a", 5], "1 to 4 strings"),
        ("stop", "x" * 257, "1 to 256 characters"),
        ("stop", {"a": 1}, "1 to 4 strings"),
        ("sage", 5, "an object with policy"),
    ],
)
def test_value_out_of_range_names_field_and_range(field: str, value: Any, hint: str) -> None:
    error = _refusal(CompletionRequest, {**COMPLETION, field: value})
    assert error.param == field
    assert hint in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 2.0),
        ("top_p", 1),
        ("seed", -(2**63)),
        ("seed", 2**64 - 1),
        ("n", 1),
        ("stop", "a"),
        ("stop", ["a", "b", "c", "d"]),
        ("stop", None),
        ("sage", {}),
        ("sage", None),
        ("user", "somebody"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("logit_bias", {}),
        ("presence_penalty", 0),
        ("frequency_penalty", 0.0),
        ("logprobs", None),
        ("echo", False),
        ("best_of", 1),
        ("n", 128),
        ("logprobs", 0),
        ("logprobs", 20),
        ("logit_bias", {"0": -100, "7": 100.0}),
        ("logit_bias", None),
        ("stop_token_ids", [1, 1]),
        ("repetition_penalty", 1),
        ("priority", "anything"),
        ("no_such_field", {"a": [1]}),
    ],
)
def test_values_at_the_edge_and_harmless_fields_are_accepted(field: str, value: Any) -> None:
    read_request(CompletionRequest, {**COMPLETION, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", "high"),
        ("functions", [{}]),
    ],
)
def test_field_that_would_change_the_answer_is_refused(field: str, value: Any) -> None:
    error = _refusal(ChatRequest, {**CHAT, field: value})
    assert error.param == field
    assert "not supported" in error.message


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_missing_field_is_named(kind: type[CompletionRequest | ChatRequest]) -> None:
    assert (
        _refusal(kind, {"prompt": "a", "messages": CHAT["messages"]}).message
        == "Missing required field model."
    )


def test_unknown_sage_option_is_refused() -> None:
    error = _refusal(CompletionRequest, {**COMPLETION, "sage": {"budget": 5}})
    assert error.param == "sage.budget"


def test_stream_options_without_stream_are_refused() -> None:
    body = {**COMPLETION, "stream_options": {"include_usage": True}}
    assert _refusal(CompletionRequest, body).param == "stream_options"
    request = read_request(CompletionRequest, {**body, "stream": True})
    assert request.stream_options is not None and request.stream_options.include_usage


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), "messages"),
        (["hi"], "messages.0"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"content": "hi"}], "messages.0.role"),
        ([{"role": "function", "content": "hi"}], "messages.0.role"),
        ([{"role": "tool", "content": "hi"}], "messages.0.tool_call_id"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content"),
        ([{"role": "user", "content": ["hi"]}], "messages.0.content"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}], "messages.0.tool_calls"),
    ],
)
def test_malformed_messages_are_refused_where_they_are(messages: Any, param: str) -> None:
    error = _refusal(ChatRequest, {**CHAT, "messages": messages})
    assert error.param == param
    assert len(error.message) < 200


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read_request(ChatRequest, {**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].content == "a\nb"


def test_both_token_limits_exclude_each_other() -> None:
    body = {**CHAT, "max_tokens": 5, "max_completion_tokens": 5}
    assert _refusal(ChatRequest, body).param == "max_completion_tokens"


def test_top_logprobs_need_logprobs() -> None:
    assert _refusal(ChatRequest, {**CHAT, "top_logprobs": 2}).param == "top_logprobs"
    request = read_request(ChatRequest, {**CHAT, "top_logprobs": 2, "logprobs": True})
    assert (request.num_logprobs, read_request(ChatRequest, CHAT).num_logprobs) == (2, None)
    assert read_request(ChatRequest, {**CHAT, "logprobs": True}).num_logprobs == 0


def test_prompts_times_n_is_bounded() -> None:
    body = {**COMPLETION, "prompt": ["a"] * 64, "n": 2}
    assert read_request(CompletionRequest, {**body, "best_of": 2}).num_choices == 2
    assert _refusal(CompletionRequest, {**body, "n": 3}).param == "n"


def test_nothing_to_generate_needs_echo() -> None:
    assert read_request(CompletionRequest, {**COMPLETION, "max_tokens": 0, "echo": True}).max_tokens == 0
    assert _refusal(ChatRequest, {**CHAT, "max_tokens": 0}).param == "max_tokens"


def test_fields_without_effect_are_named_once_and_printably() -> None:
    turn = {"role": "user", "content": "a", "name": "b"}
    body = {
        **CHAT,
        "messages": [turn, turn],
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "priority": 3,
        "user": "me",
        "tempratur": 1,
        "a\r\nset-cookie: b": 1,
        "x" * 65: 1,
    }
    read_request(ChatRequest, body)
    assert ignored_in(ChatRequest, CHAT) == []
    header = ignored_header(ignored_in(ChatRequest, body))
    expected = "priority, tempratur, ?, ?, stream_options.include_obfuscation, messages.name"
    assert header == {"x-sage-ignored": expected}
    many = ignored_header([f"field{i}" for i in range(1000)])["x-sage-ignored"]
    assert many.endswith(", field15, ...") and many.count(",") == 16


def test_absurd_values_are_refused_at_once() -> None:
    """As large as a body can be; the time is a bound that only work without limit would break."""
    absurd = [
        {"logit_bias": {str(i): 1 for i in range(150_000)}},
        {"logit_bias": {str(i) * 100: 1 for i in range(10_000)}},
        {"stop_token_ids": list(range(400_000))},
        {"prompt": [[1]] * 150_000},
        {"prompt": ["a"] * 400_000},
        {"stop": ["a"] * 400_000},
        {"n": 10**4000},
        {"presence_penalty": -(10**4000)},
        {"max_tokens": 10**4000, "min_tokens": 10**4000},
    ]
    for change in absurd:
        started = time.process_time()
        error = _refusal(CompletionRequest, {**COMPLETION, **change})
        assert time.process_time() - started < 0.05
        assert error.param == next(iter(change)) and len(error.message) < 200


@pytest.mark.parametrize(
    ("kind", "body", "field", "value"),
    [
        (ChatRequest, CHAT, "echo", True),
        (ChatRequest, CHAT, "best_of", 2),
        (ChatRequest, CHAT, "prompt", "a"),
        (CompletionRequest, COMPLETION, "top_logprobs", 3),
        (CompletionRequest, COMPLETION, "max_completion_tokens", 3),
        (CompletionRequest, COMPLETION, "chat_template", "a"),
    ],
)
def test_field_of_the_other_endpoint_is_refused(
    kind: type[CompletionRequest | ChatRequest], body: dict[str, Any], field: str, value: Any
) -> None:
    error = _refusal(kind, {**body, field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    read_request(kind, {**body, field: None})
    assert ignored_in(kind, {**body, field: None}) == []
