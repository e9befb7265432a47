"""What a step tells about its experts, as numbers in [0, 1]. Pure functions of tensors; called by
`router.trust_collector`. Formulas and their reasons: docs/trust.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SAMPLES = 32
"""Positions of a prompt whose NLL is looked at, since each costs a row of the head."""
TOKENS_A_SAMPLE = 16
"""A shorter prompt gets fewer, so that the head stays a small part of computing it."""


def sampled_positions(num_prompt: int) -> list[int]:
    """Evenly spaced positions of a prompt that have a next token in it, ascending."""
    last = num_prompt - 1
    count = min(MAX_SAMPLES, -(-last // TOKENS_A_SAMPLE))
    return [(2 * index + 1) * last // (2 * count) for index in range(count)]


def convergence_values(nll_N: Tensor, expected_N: Tensor) -> Tensor:
    """How much better each token was predicted than its kind usually is: sigmoid(expected - observed), in nats.

    0.5 is as usual. NaN where nothing is expected yet.
    """
    return (expected_N - nll_N).sigmoid()


def consistency(
    inputs_GS: Tensor, outputs_GS: Tensor, before_inputs_GS: Tensor, before_outputs_GS: Tensor
) -> tuple[Tensor, Tensor]:
    """How alike an expert's output is to an earlier one, and how alike the inputs were: (values_G, weights_G).

    value = (1 + cosine of outputs) / 2 * (smaller norm / larger norm); weight = max(0, cosine of inputs)^2, so that
    only similar inputs count. Rows are vectors or sketches of them; a row of zeros has weight 0.
    """
    norms_G, before_norms_G = outputs_GS.norm(dim=1), before_outputs_GS.norm(dim=1)
    direction_G = (1.0 + torch.cosine_similarity(outputs_GS, before_outputs_GS, dim=1)) / 2.0
    larger_G = torch.maximum(norms_G, before_norms_G).clamp_min(torch.finfo(torch.float32).tiny)
    steadiness_G = torch.minimum(norms_G, before_norms_G) / larger_G
    weights_G = torch.cosine_similarity(inputs_GS, before_inputs_GS, dim=1).clamp_min(0.0).square()
    return direction_G * steadiness_G, weights_G


def contribution_shares(norms_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """(T, K): the part of each expert in a token's routed output, by weighted norm; rows sum to 1 (or 0)."""
    parts_TK = norms_TK * weights_TK
    return parts_TK / parts_TK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def efficiency_values(contribution_E: Tensor, bytes_E: Tensor, work_E: Tensor) -> Tensor:
    """What each expert gave for what it cost, against the others of the same call: e / (1 + e) in [0, 1].

    e = share of contribution / mean of its shares of bytes and of work. 0.5 is the layer's average; NaN for an
    expert that cost nothing. work_E: seconds, or anything proportional to them.
    """
    cost_E = (_share(bytes_E) + _share(work_E)) / 2.0
    gain_E = _share(contribution_E)
    return gain_E / (gain_E + cost_E)


def _share(amounts_E: Tensor) -> Tensor:
    shares_E: Tensor = amounts_E / amounts_E.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return shares_E


def sketch_matrix(width: int, size: int) -> Tensor:
    """(D, S) random signs, the same everywhere: products with it keep cosines within about 1/sqrt(S)."""
    generator = torch.Generator().manual_seed(0)
    signs_DS = torch.randint(0, 2, (width, size), generator=generator)
    return signs_DS.mul(2.0).sub(1.0).div(size**0.5)
