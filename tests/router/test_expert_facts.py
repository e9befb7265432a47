"""What the snarc policy knows of experts: residents are warm, the unused are novel, the unknown half trusted."""

from __future__ import annotations

import pytest
import torch

from router.expert_facts import REFRESH_TOKENS, UNSEEN_TRUST, FactSource
from router.scoring import ABSENT, Routing


def _chosen(expert: int, count: int) -> Routing:
    experts_TK = torch.tensor([[expert, ABSENT]] * count)
    return Routing(experts_TK, torch.ones(count, 2), has_absent=True)


def test_warmth_follows_residency() -> None:
    resident = {"now": frozenset({1, 3})}
    source = FactSource("model", 4, lambda component, layer: resident["now"])
    assert source.residents(0).warmth_E.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert source.residents(0).cold_E.tolist() == [True, False, True, False]
    resident["now"] = frozenset({0})
    assert source.residents(0).warmth_E.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_unused_experts_are_novel_and_used_ones_less_so_in_their_layer_only() -> None:
    source = FactSource("model", 4, lambda component, layer: frozenset())
    source.count_use(0, _chosen(2, REFRESH_TOKENS))
    novelty = source.facts(0, torch.zeros(4)).novelty_E
    assert novelty.tolist() == pytest.approx([1.0, 1.0, 0.2, 1.0])
    assert source.facts(1, torch.zeros(4)).novelty_E.tolist() == [1.0] * 4


def test_trust_is_half_unless_a_source_knows_better() -> None:
    facts = FactSource("model", 2, lambda component, layer: frozenset()).facts(0, torch.zeros(2))
    assert facts.trust_E.tolist() == [UNSEEN_TRUST] * 2
    known = torch.tensor([0.1, 0.9])
    source = FactSource("model", 2, lambda component, layer: frozenset(), lambda component, layer: known)
    assert torch.equal(source.facts(0, torch.zeros(2)).trust_E, known)
