"""Which tokens end an answer, by what a checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.errors import ModelFileInvalid
from gateway.settings import read_eos_token_ids


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
