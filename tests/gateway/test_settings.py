"""Which tokens end an answer, and how it is sampled, by what a checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.errors import ModelFileInvalid
from gateway.http.settings import SamplingDefaults, read_eos_token_ids, read_sampling_defaults


@dataclass(frozen=True)
class Facts:
    """What is read of a manifest."""

    config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("facts", "ids"),
    [
        (Facts(), ()),
        (Facts({"eos_token_id": 5}, {"eos_token_id": [7, 6, 7]}), (7, 6)),
        (Facts({"eos_token_id": 5}, {"temperature": 1.0}), (5,)),
        (Facts({"im_end_token_id": 9}, {"talker_top_k": 50}), (9,)),
        (Facts({"eos_token_id": None, "im_end_token_id": 9}), (9,)),
        (Facts({"eos_token_id": 5, "im_end_token_id": 9}), (5,)),
    ],
)
def test_the_most_specific_configuration_says_what_ends_an_answer(facts: Facts, ids: tuple[int, ...]) -> None:
    assert read_eos_token_ids(facts, 10) == ids


@pytest.mark.parametrize("value", [10, -1, "5", True, [1, None]])
def test_id_outside_the_vocabulary_is_refused(value: object) -> None:
    with pytest.raises(ModelFileInvalid, match="eos_token_id"):
        read_eos_token_ids(Facts({"im_end_token_id": value}), 10)


RECOMMENDED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}


def test_recommended_sampling_is_the_default_and_what_is_missing_openai_s() -> None:
    assert read_sampling_defaults(RECOMMENDED) == SamplingDefaults(0.7, 20, 0.8, 0.1, 1.05)
    assert read_sampling_defaults({"do_sample": True, **RECOMMENDED}) == SamplingDefaults(
        0.7, 20, 0.8, 0.1, 1.05
    )
    assert read_sampling_defaults({"repetition_penalty": None}) == SamplingDefaults(1.0, 0, 1.0, 0.0, 1.0)


def test_greedy_recommendation_leaves_only_its_repetition_penalty() -> None:
    greedy = {"do_sample": False, **RECOMMENDED}
    assert read_sampling_defaults(greedy) == SamplingDefaults(repetition_penalty=1.05)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("repetition_penalty", value) for value in (0, -1.0, 101, "1.1", True, float("nan"))),
        ("min_p", 1.5),
        ("top_p", -0.1),
        ("temperature", 3),
    ],
)
def test_value_that_no_request_could_have_is_refused(name: str, value: object) -> None:
    with pytest.raises(ModelFileInvalid, match=name):
        read_sampling_defaults({name: value})
