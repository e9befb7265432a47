"""From logits to the next token. Pure: the noise is a function of (seed, choice, position) and nothing else.

So a request that is moved, batched otherwise or resumed elsewhere draws the same tokens. Called by `router.engine`: for
all rows of a step at once that take any token, for each other one alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from router.request import SamplingParams

TOGETHER_BYTES = 2 << 20
"""Of probabilities that are computed together, float64: more would leave the caches between two operations."""
PREFILTER = 1024
"""How many of the best logits are sorted before a nucleus is cut; all of them if that was not enough."""


def sample(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """Draw the token at `position` (0 for the first one generated).

    logits_V: float32, or float64 where penalties or biases changed them. Filters in the order temperature, top_k,
    top_p, min_p, as `transformers` applies them.
    """
    if params.temperature == 0.0:
        return int(logits_V.argmax())
    # Shifted first: a tiny temperature would make an infinity of the best.
    wide = logits_V.double()
    scaled = (wide - wide.max()) / params.temperature
    uniform = uniform_noise(params.seed, params.choice, position)
    if not params.has_filters:
        return _draw(torch.softmax(scaled, dim=-1), uniform)
    values, tokens = _candidates(scaled, params)
    probabilities = torch.softmax(values, dim=-1)
    if params.min_p > 0.0:
        probabilities = probabilities[probabilities >= params.min_p * probabilities[0]]
    return int(tokens[_draw(probabilities, uniform)])


def sample_unfiltered(
    logits_SV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """`sample` for several rows with a temperature and no filter: each draws the token that it draws alone, since every
    operation is a row's own, in one order.
    """
    uniforms_S = [
        uniform_noise(each.seed, each.choice, position)
        for each, position in zip(params, positions, strict=True)
    ]
    temperatures_S = [each.temperature for each in params]
    noise = torch.tensor((uniforms_S, temperatures_S), dtype=torch.float64).unsqueeze(2)
    scaled_SV = logits_SV.to(torch.float64, copy=True)
    scaled_SV.sub_(scaled_SV.amax(dim=1, keepdim=True)).div_(noise[1])
    cumulative_SV = torch.softmax(scaled_SV, dim=-1).cumsum_(1)
    found_S = torch.searchsorted(cumulative_SV, noise[0] * cumulative_SV[:, -1:], right=True)
    tokens: list[int] = found_S.clamp_(max=logits_SV.shape[1] - 1).flatten().tolist()
    return tokens


def rows_together(vocab_size: int) -> int:
    """How many rows `sample_unfiltered` should be given at most; below 2 each one alone takes less time."""
    return TOGETHER_BYTES // (8 * vocab_size)


def uniform_noise(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from a hash of the three."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, position), digest_size=8).digest()
    bits: int = struct.unpack("<Q", digest)[0]
    return (bits >> 11) * 2.0**-53


def _candidates(scaled_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The logits that survive top_k and top_p, best first, and their token ids."""
    vocab_size = scaled_V.numel()
    if params.top_k:
        values, tokens = torch.topk(scaled_V, min(params.top_k, vocab_size))
        return _nucleus(values, tokens, torch.softmax(values, dim=-1), params.top_p)
    values, tokens = torch.topk(scaled_V, min(PREFILTER, vocab_size))
    probabilities = torch.exp(values - torch.logsumexp(scaled_V, dim=-1))
    if float(probabilities.sum()) < params.top_p or params.min_p > 0.0:
        values, tokens = torch.sort(scaled_V, descending=True, stable=True)
        probabilities = torch.softmax(values, dim=-1)
    return _nucleus(values, tokens, probabilities, params.top_p)


def _nucleus(values: Tensor, tokens: Tensor, probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Keep the shortest prefix whose probabilities reach top_p; at least one token."""
    if top_p >= 1.0:
        return values, tokens
    before = probabilities.cumsum(0) - probabilities
    keep = max(1, int((before < top_p).sum()))
    return values[:keep], tokens[:keep]


def _draw(probabilities: Tensor, uniform: float) -> int:
    """Invert the cumulative distribution at `uniform`."""
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    return min(index, probabilities.numel() - 1)
