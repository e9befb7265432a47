"""Masked experts are never chosen; those that are chosen are weighted as the checkpoint weighs."""

from __future__ import annotations

import pytest
import torch

from router.errors import MaskInvalid
from router.mask import MaskPolicy, parse_mask
from router.scoring import Routing
from router.step_routing import GateOutput
from tests.router.configs import tiny_config

LOGITS_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * 3


def _route(mask: str, *, normalise: bool = True, layer: int = 0) -> Routing:
    policy = MaskPolicy(parse_mask(mask), tiny_config())
    return policy.route((), GateOutput(layer, torch.zeros(50, 64), LOGITS_TE, 2, normalise))


def _native(*, normalise: bool = True) -> Routing:
    return GateOutput(0, torch.zeros(50, 64), LOGITS_TE, 2, normalise).native()


@pytest.mark.parametrize("normalise", [True, False])
def test_best_of_the_others_is_chosen(normalise: bool) -> None:
    routing = _route("0:1,0:3-4", normalise=normalise)
    for row, logits_E in enumerate(LOGITS_TE):
        probabilities = torch.softmax(logits_E, dim=-1).tolist()
        best = sorted((e for e in range(8) if e not in (1, 3, 4)), key=lambda e: -probabilities[e])[:2]
        total = sum(probabilities[e] for e in best) if normalise else 1.0
        assert routing.experts_TK[row].tolist() == best
        assert routing.weights_TK[row].tolist() == pytest.approx([probabilities[e] / total for e in best])


def test_token_whose_experts_are_allowed_keeps_its_bits() -> None:
    native, masked = _native(), _route("0:1,0:3-4")
    is_touched = torch.isin(native.experts_TK, torch.tensor([1, 3, 4])).any(dim=1)
    assert 0 < int(is_touched.sum()) < 50
    assert torch.equal(masked.experts_TK[~is_touched], native.experts_TK[~is_touched])
    assert torch.equal(masked.weights_TK[~is_touched], native.weights_TK[~is_touched])


def test_other_layers_stay_native() -> None:
    assert torch.equal(_route("0:0-5", layer=1).experts_TK, _native().experts_TK)


def test_as_many_as_a_token_needs_may_remain() -> None:
    assert set(_route("0:0-5").experts_TK.unique().tolist()) == {6, 7}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("0:0-6", "1 experts remain in layer 0, a token needs 2"),
        ("0:8", "8 experts, counted from 0"),
        ("2:0", "layer 2 has no experts"),
        ("0:5-3", "must rise"),
        ("0:99999", "must rise, and stay below"),
        ("", "write LAYER:EXPERT"),
        ("0", "write LAYER:EXPERT"),
        ("0:1,", "write LAYER:EXPERT"),
        ("0:-1", "write LAYER:EXPERT"),
    ],
)
def test_mask_that_cannot_be_is_refused(mask: str, reason: str) -> None:
    with pytest.raises(MaskInvalid, match=reason):
        MaskPolicy(parse_mask(mask), tiny_config())
