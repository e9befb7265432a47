"""Which code comes next, from logits. Pure: a code's noise is a function of seed, choice and its place in the speech.

A frame's code 0 is drawn as the request says; the others as `transformers` always draws them, or each the likeliest
where the request takes the likeliest. Called by `router.speech.speaker`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router.penalties import TokenHistory, adjusted
from router.request import SamplingParams
from router.sampling import sample
from router.speech.facts import CodecIds
from router.speech.wish import NUM_CODES

OTHERS_TOP_K = 50
OTHERS_TOP_P = 0.8
"""Of codes 1 to 15."""


def draw_first(
    logits_V: Tensor, sampling: SamplingParams, history: TokenHistory, codec: CodecIds, frame: int
) -> int:
    """Code 0 of a frame, or the id that ends the speech. logits_V: finite. history: of the frames before."""
    drawable_V = adjusted(logits_V, sampling, history if sampling.has_penalties else None, frame)
    end = drawable_V[codec.end].clone()
    drawable_V[codec.num_codes :] = float("-inf")
    drawable_V[codec.end] = end
    return sample(drawable_V, sampling, frame * NUM_CODES)


def draw_other(logits_V: Tensor, sampling: SamplingParams, frame: int, number: int) -> int:
    """Code `number` of a frame, from 1. logits_V: finite."""
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    own = SamplingParams(top_k=OTHERS_TOP_K, top_p=OTHERS_TOP_P, seed=sampling.seed, choice=sampling.choice)
    return sample(logits_V, own, frame * NUM_CODES + number)


def is_finite(logits_V: Tensor) -> bool:
    return bool(torch.isfinite(logits_V).all())
