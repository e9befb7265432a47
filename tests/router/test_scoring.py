"""Native routing against the published router, and its indifference to the batch, ties included."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextTopKRouter

from router.scoring import route_native


def _published(num_experts: int, k: int, normalise: bool) -> Qwen3OmniMoeThinkerTextTopKRouter:
    """A router whose gate passes its input through, so that both sides see the same logits."""
    router = Qwen3OmniMoeThinkerTextTopKRouter(
        Qwen3OmniMoeTextConfig(
            hidden_size=num_experts,
            num_experts=num_experts,
            num_experts_per_tok=k,
            norm_topk_prob=normalise,
        )
    )
    router.weight.data = torch.eye(num_experts)
    return router


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), [(128, 8), (8, 2), (8, 8), (60, 4), (5, 1)])
def test_experts_and_weights_equal_the_published_ones(num_experts: int, k: int, normalise: bool) -> None:
    logits = torch.randn(200, num_experts, generator=torch.Generator().manual_seed(k)) * 3
    with torch.no_grad():
        _, weights, experts = _published(num_experts, k, normalise)(logits)
    routing = route_native(logits, k, normalise)
    assert torch.equal(routing.experts_TK, experts)
    assert torch.equal(routing.weights_TK, weights)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    """The published router rounds the weights to the model's dtype; here they stay float32 up to the sum."""
    logits = (torch.randn(50, 16, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    router = _published(16, 4, True).bfloat16()
    with torch.no_grad():
        _, weights, experts = router(logits)
    routing = route_native(logits, 4, True)
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.experts_TK, experts)
    assert torch.equal(routing.weights_TK.bfloat16(), weights)


@pytest.mark.parametrize(("num_experts", "k"), [(128, 8), (8, 2), (60, 4)])
def test_equal_logits_go_to_the_same_experts_in_any_batch(num_experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randint(0, 3, (600, num_experts), generator=generator).float()
    logits[::5] = 0.0
    whole = route_native(logits, k, True)
    for first, count in ((0, 1), (5, 1), (17, 3), (100, 64), (599, 1), (300, 300)):
        rows = slice(first, first + count)
        part = route_native(logits[rows].clone(), k, True)
        assert torch.equal(part.experts_TK, whole.experts_TK[rows])
        assert torch.equal(part.weights_TK, whole.weights_TK[rows])
    distinct = whole.experts_TK.sort(-1).values
    assert (distinct[:, 1:] > distinct[:, :-1]).all(), "no expert is chosen twice"


def test_huge_logits_make_finite_weights() -> None:
    routing = route_native(torch.tensor([[3e38, -3e38, 3e38, 0.0]]), 3, True)
    assert routing.weights_TK.isfinite().all()
    assert set(routing.experts_TK[0, :2].tolist()) == {0, 2}
