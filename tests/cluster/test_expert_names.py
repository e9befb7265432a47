"""Many experts in few words."""

from __future__ import annotations

from cluster.expert_names import by_layer, name_experts
from extraction.manifest import ExpertKey


def test_long_lists_are_cut_with_the_number_of_what_is_left_out() -> None:
    keys = [ExpertKey("m", layer, expert) for layer in range(11) for expert in (1, 2, 5)]
    text = name_experts(by_layer(keys))
    assert text.startswith("m/0: 1-2, 5; m/1: 1-2, 5; ")
    assert text.endswith("; and 3 more layers")
