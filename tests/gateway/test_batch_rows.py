"""Each row gets the checks of the HTTP service, and its own error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from gateway.batch.plan import RowDefaults, row_seed
from gateway.batch.rows import PreparedRow, RawRow, RowPreparer
from gateway.http.settings import GatewaySettings
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from tests.conftest import STORIES

CONTEXT = 200
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


@pytest.fixture(scope="module")
def preparer() -> Iterator[RowPreparer]:
    tokenizer = TextTokenizer.from_folder(STORIES)
    settings = GatewaySettings("m", 0, CONTEXT, 4096)
    template = ChatTemplate.from_folder(STORIES, tokenizer)
    with closing(RowPreparer(settings, tokenizer, template, RowDefaults(seed=3, max_tokens=7))) as made:
        yield made


def _prepare(preparer: RowPreparer, row: object, index: int = 0) -> PreparedRow:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return preparer.prepare(RawRow(index, line=line))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"prompt": "a"', "The row is not valid JSON"),
        (b"[1]", "The row must be a JSON object."),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt":' + b"[" * 100, "nested deeper"),
        ({}, "exactly one of prompt and messages"),
        ({"prompt": "a", "messages": BODY["messages"]}, "exactly one of prompt and messages"),
        ({"prompt": ""}, "must not be empty"),
        ({"prompt": ["a", "b"]}, "A row gets one answer"),
        ({"prompt": [4096]}, "token ids must be from 0 to 4095"),
        ({"prompt": [1] * CONTEXT}, "context is 200 tokens"),
        ({"prompt": "a", "max_tokens": 10**9}, "context is 200 tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: must be a whole number from 1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature: must be a number from 0 to 2"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "model": "other"}, "'other' does not exist"),
        ({"prompt": "a", "logprobs": 3}, "logprobs is not supported in a batch"),
        ({"prompt": "a", "stream": True}, "stream is not supported in a batch"),
        ({"prompt": "a", "n": 2}, "A row gets one answer"),
        ({"prompt": "a", "echo": True, "max_tokens": 0}, "echo is not supported in a batch"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "id": ["x"]}, "id must be a string"),
        ({"prompt": "a", "id": "x" * 513}, "id is longer"),
        ({"messages": [{"role": "root", "content": "a"}]}, "messages.0.role"),
        (LINE | {"method": "GET"}, "method must be POST"),
        (LINE | {"url": "/v1/embeddings"}, "url must be"),
        (LINE | {"body": 1}, "body must be an object"),
        (LINE | {"prompt": "a"}, "Unknown field prompt"),
        ({**LINE, "custom_id": None}, "Missing required field custom_id"),
        (LINE | {"body": BODY | {"model": "other"}}, "'other' does not exist"),
    ],
)
def test_bad_row_is_an_error_that_names_the_field(preparer: RowPreparer, row: object, reason: str) -> None:
    prepared = _prepare(preparer, row)
    assert prepared.job is None
    assert reason in str(prepared.error)
    assert str(prepared.error).isprintable()


def test_error_keeps_the_row_s_id(preparer: RowPreparer) -> None:
    assert _prepare(preparer, {"id": 17, "prompt": ""}).id == "17"
    assert _prepare(preparer, LINE | {"method": "GET"}).id == "a"


def _sampling(prepared: PreparedRow) -> Any:
    assert prepared.job is not None, prepared.error
    return prepared.job.choices[0].request.sampling


def test_row_without_options_gets_the_job_s_and_a_seed_of_its_index(preparer: RowPreparer) -> None:
    first, again, second = (_prepare(preparer, {"prompt": "a"}, index) for index in (4, 4, 5))
    assert _sampling(first) == _sampling(again)
    assert (_sampling(first).seed, _sampling(second).seed) == (row_seed(3, 4), row_seed(3, 5))
    assert _sampling(first).max_tokens == 7


def test_row_s_own_options_win(preparer: RowPreparer) -> None:
    row = {"prompt": [1, 2], "seed": 9, "max_tokens": 2, "temperature": 0.5, "top_k": 4, "min_p": 0.1}
    sampling = _sampling(_prepare(preparer, row))
    assert (sampling.seed, sampling.max_tokens, sampling.temperature) == (9, 2, 0.5)
    assert (sampling.top_k, sampling.min_p) == (4, 0.1)


def test_openai_line_and_plain_row_are_the_same_job(preparer: RowPreparer) -> None:
    line, plain = (
        _prepare(preparer, LINE),
        _prepare(preparer, {"messages": BODY["messages"], "max_tokens": 3}),
    )
    assert line.job is not None and plain.job is not None
    assert line.job.choices[0].request.prompt_ids == plain.job.choices[0].request.prompt_ids
    assert _sampling(line) == _sampling(plain)
    assert line.id == "a"


def test_max_completion_tokens_of_a_line_is_not_overruled(preparer: RowPreparer) -> None:
    body = {"messages": BODY["messages"], "max_completion_tokens": 2}
    assert _sampling(_prepare(preparer, LINE | {"body": body})).max_tokens == 2
