"""Gates that route with a stated skew and locality."""

from __future__ import annotations

import pytest
import torch

from benchmarks.slice_routing import (
    HiddenShape,
    RoutingUnreachable,
    calibrate,
    embedding_rows,
    gate_matrix,
    measure,
    token_walk,
)

EXPERTS, PER_TOKEN, WIDTH = 16, 2, 64
HIDDEN = HiddenShape(WIDTH)


def test_measure_counts_the_busier_half_and_what_neighbours_share() -> None:
    experts_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 4]])
    facts = measure(experts_TK, 6)
    assert facts.skew == pytest.approx(6 / 8)  # experts 0, 1 and one other
    assert facts.locality == pytest.approx((2 + 1 + 0) / 3 / 2)


@pytest.mark.parametrize(("skew", "locality"), [(0.75, 0.35), (0.62, 0.2), (0.9, 0.45)])
def test_calibrated_gate_routes_as_asked(skew: float, locality: float) -> None:
    shape = calibrate(skew, locality, EXPERTS, PER_TOKEN, HIDDEN.num_topics)
    generator = torch.Generator().manual_seed(5)
    ids = token_walk(4000, 512, HIDDEN.num_topics, generator)
    hidden_TD = embedding_rows(0, 512, HIDDEN, generator)[ids]
    layers = [
        measure(
            (hidden_TD @ gate_matrix(shape, HIDDEN, EXPERTS, generator).t()).topk(PER_TOKEN).indices, EXPERTS
        )
        for _ in range(4)
    ]
    # A layer's tastes are drawn for 16 topics only: single layers scatter around what was asked.
    assert sum(facts.skew for facts in layers) / 4 == pytest.approx(skew, abs=0.05)
    assert sum(facts.locality for facts in layers) / 4 == pytest.approx(locality, abs=0.05)


def test_locality_below_what_the_skew_implies_is_refused_with_the_range() -> None:
    with pytest.raises(
        RoutingUnreachable, match=r"locality 0.01 cannot be had with skew 0.9; choose from 0\.\d+ to 0\."
    ):
        calibrate(0.9, 0.01, EXPERTS, PER_TOKEN, HIDDEN.num_topics)


def test_token_walk_keeps_to_a_topic_and_inside_the_vocabulary() -> None:
    ids = token_walk(5000, 100, 16, torch.Generator().manual_seed(0))
    topics = ids % 16
    stayed = (topics[1:] == topics[:-1]).float().mean()
    assert int(ids.min()) >= 0 and int(ids.max()) < 100
    assert float(stayed) == pytest.approx(0.9 + 0.1 / 16, abs=0.03)
    assert len(topics.unique()) == 16


def test_embeddings_have_mean_square_one() -> None:
    rows = embedding_rows(3, 200, HIDDEN, torch.Generator().manual_seed(0))
    assert float(rows.square().mean()) == pytest.approx(1.0, abs=0.05)
