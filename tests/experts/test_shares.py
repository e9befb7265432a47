"""A call is cut by place without losing or doubling a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.call import ExpertCall
from experts.shares import Place, join, split_by_place, thin
from tests.experts.fleet import (
    NAMES,
    NUM_EXPERTS,
    call_of,
)
from tests.experts.wire_peers import (
    rows_of,
)

pytestmark = pytest.mark.usefixtures("nothing_stays")


calls = st.builds(
    call_of,
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1).map(sorted).map(tuple),
)


@given(calls, st.lists(st.sampled_from((*NAMES, None)), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS))
@settings(max_examples=50, deadline=None)
def test_split_call_covers_every_row_once(call: ExpertCall, places: list[Place]) -> None:
    shares = split_by_place(call, places[: len(call.experts)])
    assert sorted(row for share in shares.values() for row in share.rows) == list(range(call.num_rows))
    whole = rows_of(call)
    for place, share in shares.items():
        share.call.validate()
        assert torch.equal(rows_of(share.call), whole[list(share.rows)])
        assert share.call.tokens_TD.shape[0] == len(set(share.call.token_of_R)) or len(shares) == 1
        for expert in share.call.experts:
            assert places[call.experts.index(expert)] == place
    parts = [(share, rows_of(share.call)) for share in shares.values()]
    assert torch.equal(join(parts, call.num_rows), whole)


@given(calls, st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_thinned_call_has_the_first_rows_of_every_expert(call: ExpertCall, most: int) -> None:
    part, rows = thin(call, most)
    part.validate()
    assert part.experts == call.experts
    assert part.counts == tuple(min(count, most) for count in call.counts)
    assert torch.equal(rows_of(part), rows_of(call)[rows])
