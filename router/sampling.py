"""From logits to the next token. Pure: the noise is a function of (seed, choice, position) and nothing else.

A token's weight is a whole number: the likeliest has 2^42, another one that times e^(difference / temperature), to the
nearest. Whole numbers add up to the same in any order, and a weight takes IEEE operations on that logit alone, so a row
gives the same token by our own C source at any level (`router.native_sampling`) as by PyTorch, alone or beside others,
in any number of threads. A request that is moved, batched otherwise or resumed elsewhere draws the same tokens. Called
by `router.drawing` and `router.speech.drawing`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from experts.native_products import chosen_level
from router.native_sampling import draw_rows, sharpness_of
from router.request import SamplingParams

WEIGHT_BITS = 42
ID_BITS = 20
"""Of a token's id: a larger vocabulary has more tokens than weights can be summed of."""
LOWEST = -40.0
"""Of exponents: those below have no weight."""
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_TERMS = [1.0 / math.factorial(degree) for degree in range(12)]
"""Of the exponential's series."""
TOGETHER_BYTES = 2 << 20
"""Of weights that PyTorch computes together: more would leave the caches between two operations."""
PREFILTER = 1024
"""How many of the best are sorted before a nucleus is cut; all of them if that was not enough."""


def sample(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """Draw the token at `position` (0 for the first one generated).

    logits_V: float32, or float64 where penalties or biases changed them. Filters in the order temperature, top_k,
    top_p, min_p, as `transformers` applies them; of equal weights the lower token counts as the better one.
    """
    if params.temperature == 0.0:
        return int(logits_V.argmax())
    return sample_rows(logits_V.unsqueeze(0), [params], [position])[0]


def sample_rows(logits_SV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """`sample` for several rows with a temperature above 0."""
    if logits_SV.shape[1] >> ID_BITS:
        raise ValueError(f"no token of {logits_SV.shape[1]} is drawn")
    uniforms = [
        uniform_noise(each.seed, each.choice, position)
        for each, position in zip(params, positions, strict=True)
    ]
    level = _level()
    if level is not None:
        return draw_rows(level, logits_SV.contiguous(), params, uniforms)
    return draw_rows_in_torch(logits_SV, params, uniforms)


def draw_rows_in_torch(
    logits_SV: Tensor, params: Sequence[SamplingParams], uniforms_S: Sequence[float]
) -> list[int]:
    """As `router.native_sampling.draw_rows`."""
    tokens: list[int] = []
    most = max(1, TOGETHER_BYTES // (8 * logits_SV.shape[1]))
    for first in range(0, len(params), most):
        some = params[first : first + most]
        weights_SV = weigh(logits_SV[first : first + most], [sharpness_of(each) for each in some])
        for weights_V, each, uniform in zip(weights_SV, some, uniforms_S[first : first + most], strict=True):
            if each.has_filters:
                keys = _keep(weights_V, each)
                tokens.append(_token_of(keys[_draw(keys >> ID_BITS, uniform)]))
            else:
                tokens.append(_draw(weights_V, uniform))
    return tokens


def weigh(logits_SV: Tensor, sharpness_S: Sequence[float]) -> Tensor:
    """(S, V) int64 weights. What is no number has none."""
    wide_SV = logits_SV.double()
    largest_S1 = wide_SV.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1, keepdim=True)
    exponents_SV = (wide_SV - largest_S1) * torch.tensor(sharpness_S, dtype=torch.float64).unsqueeze(1)
    exponents_SV = torch.where(exponents_SV > LOWEST, exponents_SV, LOWEST)
    n_SV = (exponents_SV * math.log2(math.e)).round_()
    rest_SV = exponents_SV.sub_(n_SV * LN2_HIGH).sub_(n_SV * LN2_LOW)
    power_SV = _exponential(rest_SV)
    scale_SV = ((n_SV.long() + (1023 + WEIGHT_BITS)) << 52).view(torch.float64)  # 2^(WEIGHT_BITS + n)
    return power_SV.mul_(scale_SV).round_().long()


def uniform_noise(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from a hash of the three."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _exponential(r: Tensor) -> Tensor:
    """e^r for |r| <= ln(2) / 2, to 2^-47, in the tree of draws.h."""
    r2 = r * r
    r4 = r2 * r2

    def four_terms(first: int) -> Tensor:
        return (r * _TERMS[first + 1] + _TERMS[first]) + (r * _TERMS[first + 3] + _TERMS[first + 2]) * r2

    return (four_terms(0) + four_terms(4) * r4) + four_terms(8) * (r4 * r4)


@functools.cache
def _level() -> str | None:
    return chosen_level(torch.float32)


def _keep(weights_V: Tensor, params: SamplingParams) -> Tensor:
    """Keys (weight, then the lower token first) of the tokens that all filters leave, best first; at least one."""
    keys = _best_first(weights_V, params)
    weights = keys >> ID_BITS
    total = int(weights.sum()) if params.top_k else int(weights_V.sum())
    is_kept = weights.double() >= params.min_p * 2.0**WEIGHT_BITS
    if params.top_p < 1.0:
        is_kept &= (weights.cumsum(0) - weights).double() < params.top_p * float(total)
    return keys[: max(1, int(is_kept.sum()))]


def _best_first(weights_V: Tensor, params: SamplingParams) -> Tensor:
    """As many as the filters may leave."""
    vocab_size = len(weights_V)
    keys_V = (weights_V << ID_BITS) | torch.arange((1 << ID_BITS) - 1, (1 << ID_BITS) - 1 - vocab_size, -1)
    if params.top_k:
        return torch.topk(keys_V, min(params.top_k, vocab_size)).values
    best = torch.topk(keys_V, min(PREFILTER, vocab_size)).values
    is_enough = float((best >> ID_BITS).sum()) >= params.top_p * float(weights_V.sum())
    return best if params.top_p < 1.0 and is_enough else torch.sort(keys_V, descending=True).values


def _token_of(key: Tensor) -> int:
    return (1 << ID_BITS) - 1 - (int(key) & ((1 << ID_BITS) - 1))


def _draw(weights: Tensor, uniform: float) -> int:
    """Invert the cumulative distribution at `uniform`; the first where there are no weights."""
    cumulative = weights.cumsum(0)
    total = int(cumulative[-1])
    unit = min(int(uniform * float(total)), total - 1)
    return int(torch.searchsorted(cumulative, unit, right=True))
