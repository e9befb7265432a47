"""The five signals of a token in a layer, each in [0, 1]: surprise, novelty, arousal, reward, conflict. Pure functions.

They see the gate's input (hidden state) and output (logits) at the token and at the WINDOW positions before it in the
same request, and nothing else: not the batch, not how a prompt was cut into chunks. Each row's bits are the same
whatever rows are beside it, so only sums within a row, square roots and quotients are used (and the library's softmax,
which goes row by row); `router.signal_memory` keeps the positions before.

A hidden state is seen through a sketch: its D numbers with fixed random signs, summed into S groups. Lengths and angles
come out of it as they are in expectation, with an error near sqrt(2 / S), at a fraction of the cost.

Named after the salience of the seed (surprise, novelty, arousal, reward, conflict); the formulas are this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SKETCH_WIDTH = 64
"""S, or the largest divisor of D that divides it."""
WINDOW = 16
"""W: how many positions back a token remembers."""
RECENT = 4
"""Positions whose mean predicts the next hidden state."""
GAIN_POSITIONS = 4
"""Prompt positions in either half of what confidence gain compares."""
_TINY = 1e-6


@dataclass(frozen=True)
class Sketch:
    """How hidden states of one width are made small."""

    signs_GS: Tensor
    """float32, +1 or -1: D = G * S of them."""

    @classmethod
    def for_width(cls, width: int) -> Sketch:
        size = math.gcd(width, SKETCH_WIDTH)
        generator = torch.Generator().manual_seed(width)
        signs_D = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
        return cls(signs_D.float().view(-1, size))

    @property
    def width(self) -> int:
        """S."""
        return self.signs_GS.shape[1]

    def of(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Directions (T, S) and lengths (T, 1), float32. A zero row has a zero direction."""
        signed_TGS = hidden_TD.view(-1, *self.signs_GS.shape) * self.signs_GS
        sketch_TS = signed_TGS.sum(1)
        length_T1: Tensor = torch.linalg.vector_norm(sketch_TS, dim=-1, keepdim=True)
        return sketch_TS / length_T1.clamp_min(_TINY), length_T1


@dataclass(frozen=True)
class Past:
    """The W positions before each of T tokens, nearest first, zeros before the request's beginning. Fewer than WINDOW
    where only surprise is asked for, and without lengths where arousal is not."""

    directions_TWS: Tensor
    lengths_TW: Tensor | None
    num_recent_T: Tensor
    """float32: how many of the RECENT nearest exist, at least 1."""
    num_T: Tensor
    """float32: how many of the W exist, at least 1."""


@dataclass(frozen=True)
class Signals:
    """Of T tokens, float32. None where nobody asked for them."""

    surprise_T: Tensor | None = None
    novelty_T: Tensor | None = None
    arousal_T: Tensor | None = None
    reward_T: Tensor | None = None
    conflict_T: Tensor | None = None


def surprise(direction_TS: Tensor, past: Past) -> Tensor:
    """Distance of a token's direction u from its prediction p, the mean of the RECENT before: |u - p| / (|u| + |p|).

    0 for what was predicted; 1 for the opposite, and for a request's first token. (T,)
    """
    predicted_TS = past.directions_TWS[:, :RECENT].sum(1) / past.num_recent_T.unsqueeze(-1)
    distance_T: Tensor = torch.linalg.vector_norm(direction_TS - predicted_TS, dim=-1)
    whole_T: Tensor = torch.linalg.vector_norm(predicted_TS, dim=-1) + 1.0
    return (distance_T / whole_T).clamp_max(1.0)


def novelty(direction_TS: Tensor, past: Past) -> Tensor:
    """1 - the highest cosine similarity to the W states before, where that is positive; 1 for the first token. (T,)"""
    cosine_TW = (past.directions_TWS * direction_TS.unsqueeze(1)).sum(-1)
    return 1.0 - cosine_TW.amax(-1).clamp(0.0, 1.0)


def arousal(length_T1: Tensor, past: Past) -> Tensor:
    """Intensity s of a token's state beside the mean m of the W before: s / (s + m).

    1/2 for the usual, more for the intense; 1 for the first token. (T,)
    """
    assert past.lengths_TW is not None
    length_T = length_T1.squeeze(-1)
    usual_T = past.lengths_TW.sum(-1) / past.num_T
    return length_T / (length_T + usual_T).clamp_min(_TINY)


def conflict(logits_TE: Tensor) -> Tensor:
    """Entropy of the gate's probabilities over its maximum, ln E: 0 for one certain expert, 1 for none better. (T,)"""
    num_experts = logits_TE.shape[-1]
    if num_experts == 1:
        return logits_TE.new_zeros(logits_TE.shape[0])
    log_TE = torch.log_softmax(logits_TE, dim=-1)
    entropy_T = (torch.softmax(logits_TE, dim=-1) * log_TE).sum(-1)
    return (entropy_T * (-1.0 / math.log(num_experts))).clamp(0.0, 1.0)


def reward(confidence_TL: Tensor) -> Tensor:
    """Running confidence gain: the gate's confidence c = 1 - conflict over the newer half n of the L prompt positions
    before, beside the older half o: n / (n + o).

    1/2 where nothing changed, and where fewer than L positions exist (zeros). After the prompt it stays as it was at
    its end. confidence_TL: nearest first. (T,)
    """
    newer_T = confidence_TL[:, :GAIN_POSITIONS].sum(-1) + _TINY
    older_T = confidence_TL[:, GAIN_POSITIONS:].sum(-1) + _TINY
    return newer_T / (newer_T + older_T)
