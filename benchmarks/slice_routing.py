"""How a slice's random weights route: which experts are busy, and how much neighbouring tokens share.

Hidden states of a slice have three parts in coordinates of their own: one value that all tokens share, a topic
(one-hot) and noise of the token's own. A gate's logits are therefore `busy * popularity + topical * taste + rest *
noise`, each factor standard normal over experts, and two numbers shape the routing: `busy` sets the skew,
`topical` the locality. The layers themselves add little to the hidden states, so that what was calibrated here
holds behind them. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

TOPIC_STAY = 0.9
"""Probability that a token keeps to the topic of the one before."""
COMMON_SHARE, TOPIC_SHARE = 0.25, 0.25
"""Of a hidden state's squared length; the rest is the token's own."""
SAMPLE_TOKENS = 1024
BISECTIONS = 10
TOLERANCE = 0.02
MAX_BUSY = 4.0


class RoutingUnreachable(ValueError):
    """No gate has this skew and locality together."""

    def __init__(self, locality: float, lowest: float, highest: float, skew: float) -> None:
        super().__init__(locality, lowest, highest, skew)
        self.locality, self.lowest, self.highest, self.skew = locality, lowest, highest, skew

    def __str__(self) -> str:
        return (
            f"locality {self.locality} cannot be had with skew {self.skew}; "
            f"choose from {math.ceil(self.lowest * 100) / 100} to {math.floor(self.highest * 100) / 100}"
        )


@dataclass(frozen=True)
class RoutingFacts:
    """What routing looks like, from the experts of consecutive tokens."""

    skew: float
    """Share of activations that the busier half of the experts takes; 0.5 is uniform."""
    locality: float
    """Share of a token's experts that the token before it used as well."""


@dataclass(frozen=True)
class GateShape:
    """Factors of the three parts of a gate's logits; topical**2 + rest**2 = 1."""

    busy: float
    topical: float

    @property
    def rest(self) -> float:
        return math.sqrt(1.0 - self.topical**2)


@dataclass(frozen=True)
class HiddenShape:
    """Where the three parts of a hidden state of width D lie: coordinate 0, then the topics, then the rest."""

    width: int

    @property
    def num_topics(self) -> int:
        return min(64, self.width // 4)

    @property
    def first_own(self) -> int:
        return 1 + self.num_topics

    @property
    def common(self) -> float:
        """Value of coordinate 0 in a hidden state whose mean square is 1."""
        return math.sqrt(COMMON_SHARE * self.width)

    @property
    def topic(self) -> float:
        return math.sqrt(TOPIC_SHARE * self.width)

    @property
    def own_length(self) -> float:
        """Euclidean length of the token's own part."""
        return math.sqrt((1.0 - COMMON_SHARE - TOPIC_SHARE) * self.width)


def measure(experts_TK: Tensor, num_experts: int) -> RoutingFacts:
    """experts_TK: int64, the experts of T consecutive tokens in one layer."""
    counts = torch.bincount(experts_TK.flatten(), minlength=num_experts).sort(descending=True).values
    skew = counts[: num_experts // 2].sum() / counts.sum()
    chosen_TE = torch.zeros(len(experts_TK), num_experts).scatter_(1, experts_TK, 1.0)
    locality = (chosen_TE[1:] * chosen_TE[:-1]).sum(1).mean() / experts_TK.shape[1]
    return RoutingFacts(float(skew), float(locality))


def token_walk(num_tokens: int, vocab_size: int, num_topics: int, generator: torch.Generator) -> Tensor:
    """(num_tokens,) ids that keep to a topic for a while; token i's topic is i % num_topics."""
    stays = torch.rand(num_tokens, generator=generator) < TOPIC_STAY
    fresh = torch.randint(num_topics, (num_tokens,), generator=generator)
    # A topic lasts from the token that drew it up to the next one that draws.
    drawn_at = torch.where(stays, 0, torch.arange(num_tokens)).cummax(0).values
    members = vocab_size // num_topics
    return fresh[drawn_at] + num_topics * torch.randint(members, (num_tokens,), generator=generator)


def popularity(num_experts: int, generator: torch.Generator) -> Tensor:
    """(E,) the quantiles of a standard normal in random order: every layer has the same skew."""
    normal = NormalDist()
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / num_experts) for i in range(num_experts)])
    return quantiles[torch.randperm(num_experts, generator=generator)]


def calibrate(
    skew: float, locality: float, num_experts: int, experts_per_token: int, num_topics: int
) -> GateShape:
    """The gate whose routing of a `token_walk` has this skew and locality.

    For each topical share the skew is met first; both grow with their factor. Raises RoutingUnreachable.
    """
    generator = torch.Generator().manual_seed(0)
    popular_E = popularity(num_experts, generator)
    topics_T = token_walk(SAMPLE_TOKENS, num_topics, num_topics, generator)
    taste_TE = torch.randn(num_topics, num_experts, generator=generator)[topics_T]
    noise_TE = torch.randn(SAMPLE_TOKENS, num_experts, generator=generator)

    def facts(shape: GateShape) -> RoutingFacts:
        logits_TE = shape.busy * popular_E + shape.topical * taste_TE + shape.rest * noise_TE
        return measure(logits_TE.topk(experts_per_token, dim=1).indices, num_experts)

    def shaped(topical: float) -> GateShape:
        busy = _bisect(lambda value: facts(GateShape(value, topical)).skew, skew, MAX_BUSY)
        return GateShape(busy, topical)

    lowest, highest = facts(shaped(0.0)).locality, facts(shaped(1.0)).locality
    if not lowest - TOLERANCE <= locality <= highest + TOLERANCE:
        raise RoutingUnreachable(locality, lowest, highest, skew)
    return shaped(_bisect(lambda value: facts(shaped(value)).locality, locality, 1.0))


def gate_matrix(
    shape: GateShape, hidden: HiddenShape, num_experts: int, generator: torch.Generator
) -> Tensor:
    """(E, D) float32: one layer's gate, with a popularity and tastes of its own."""
    gate_ED = torch.empty(num_experts, hidden.width)
    gate_ED[:, 0] = popularity(num_experts, generator) * (shape.busy / hidden.common)
    tastes = gate_ED[:, 1 : hidden.first_own]
    tastes.normal_(0.0, 1.0, generator=generator).mul_(shape.topical / hidden.topic)
    own = gate_ED[:, hidden.first_own :]
    own.normal_(0.0, 1.0, generator=generator).mul_(shape.rest / hidden.own_length)
    return gate_ED


def embedding_rows(first: int, count: int, hidden: HiddenShape, generator: torch.Generator) -> Tensor:
    """(count, D) float32 embeddings of tokens `first` and on, of mean square 1."""
    rows = torch.zeros(count, hidden.width)
    rows[:, 0] = hidden.common
    ids = torch.arange(first, first + count)
    rows[torch.arange(count), 1 + ids % hidden.num_topics] = hidden.topic
    own = rows[:, hidden.first_own :]
    own.normal_(0.0, hidden.own_length / math.sqrt(own.shape[1]), generator=generator)
    return rows


def head_rows(first: int, count: int, hidden: HiddenShape, generator: torch.Generator) -> Tensor:
    """(count, D) float32 rows of the head: sampled at temperature 1, a text keeps to its topic like a `token_walk`."""
    rows = torch.zeros(count, hidden.width)
    advantage = math.log(TOPIC_STAY / (1.0 - TOPIC_STAY) * max(1, hidden.num_topics - 1))
    ids = torch.arange(first, first + count)
    rows[torch.arange(count), 1 + ids % hidden.num_topics] = advantage / hidden.topic
    own = rows[:, hidden.first_own :]
    own.normal_(0.0, 1.0 / hidden.own_length, generator=generator)
    return rows


def _bisect(value_at: Callable[[float], float], wanted: float, highest: float) -> float:
    """Where a function that grows from 0 to `highest` reaches a value; an end where it never does."""
    low, high = 0.0, highest
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if value_at(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
