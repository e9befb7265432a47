"""From gate logits to the experts of each token. Pure functions; called by `router.step_routing` and `router.steering`.

The snarc score of expert e for token t, from the seed's "SNARC-Weighted Expert Selection":

    w.router * gate_te + w.novelty * surprise_t * novelty_e + w.trust * reward_t * trust_e + w.warmth * warmth_e

Only the choice is made by the score. The chosen experts are mixed by the gate's own probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from router.errors import WeightsInvalid
from router.native_routing import route_rows

ABSENT = -1
"""In place of an expert at the ranks that a token does not use."""
MAX_KEPT = 1024
"""More experts than a token gets in any model."""
_KEPT = 1e6
"""Above every score; of the token's best experts, where they are to be kept."""


class StandIns(NamedTuple):
    """What is added to some tokens' outputs in place of experts that they are not sent to."""

    rows_N: Tensor
    """int64, ascending, each once."""
    output_ND: Tensor
    """float32."""


@dataclass(frozen=True)
class Routing:
    """The experts of T tokens, best first. A token with fewer than K has ABSENT at some ranks, not at all."""

    experts_TK: Tensor
    """int64."""
    weights_TK: Tensor
    """float32 mixing weights; 0 at absent ranks."""
    has_absent: bool = False
    stand_ins: StandIns | None = None

    @property
    def indices_TK(self) -> Tensor:
        """The experts with some expert in place of ABSENT, to index with; its weight there is 0."""
        return self.experts_TK.clamp_min(0) if self.has_absent else self.experts_TK


def route_native(
    gate_logits_TE: Tensor, experts_per_token: int, normalise: bool, level: str | None = None
) -> Routing:
    """The checkpoint's own routing: softmax over all experts in float32, then top-k.

    normalise: make the chosen weights sum to 1 (`norm_topk_prob`). Logits may be of any float dtype. level: of our own
    products, where the model is computed by them.
    """
    if level is not None:
        return Routing(*route_rows(level, gate_logits_TE, experts_per_token, normalise))
    probabilities_TE = torch.softmax(gate_logits_TE.float(), dim=-1)
    weights_TK, experts_TK = torch.topk(probabilities_TE, experts_per_token, dim=-1)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(experts_TK, weights_TK)


@dataclass(frozen=True)
class SnarcWeights:
    """What the terms of the snarc score weigh."""

    router: float = 0.5
    novelty: float = 0.2
    trust: float = 0.2
    warmth: float = 0.1
    keep_best: int = 0
    """The token's best experts by its gate that are always among the chosen."""
    stand_in: float = 0.0
    """Chosen experts that are not resident and whose part in the token's output is below this share of an even one are
    replaced by their mean output; 0 replaces none. See `router.stand_in`."""
    is_scaled: bool = True
    """Divide each token's logits by their range, so that all terms are of one size; else they are taken raw."""

    def __post_init__(self) -> None:
        for name in ("router", "novelty", "trust", "warmth"):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value <= 100:
                raise WeightsInvalid(f"{name} must be a number from 0 to 100, not {value:g}")
        if not math.isfinite(self.stand_in) or not 0 <= self.stand_in <= 16:
            raise WeightsInvalid(f"stand_in must be a number from 0 to 16, not {self.stand_in:g}")
        if not 0 <= self.keep_best <= MAX_KEPT:
            raise WeightsInvalid(
                f"keep_best must be a whole number from 0 to {MAX_KEPT}, not {self.keep_best}"
            )


PRESETS: dict[str, SnarcWeights] = {
    "scaled": SnarcWeights(),
    "seed": SnarcWeights(is_scaled=False),
    "warm": SnarcWeights(router=1.0, novelty=0.0, trust=0.0, warmth=0.1),
    "thrifty": SnarcWeights(router=1.0, novelty=0.0, trust=0.0, warmth=0.05, stand_in=0.6),
}
"""scaled: the seed's weights with all terms on one scale. seed: its literal form, on raw logits. warm: the gate and
nothing but warmth. thrifty: the gate, a little warmth, and mean outputs in place of absent experts that hardly weigh;
of those tried it cost the least quality for the misses that it saved (docs/quality.md)."""
DEFAULT_PRESET = "thrifty"


def read_weights(text: str) -> SnarcWeights:
    """From a preset's name, NAME=VALUE pairs that change the default preset, or a name and pairs, with commas
    between: `warm,warmth=0.2,keep_best=2`. Raises WeightsInvalid."""
    weights, pairs = PRESETS[DEFAULT_PRESET], text.split(",")
    if "=" not in pairs[0]:
        if pairs[0] not in PRESETS:
            raise WeightsInvalid(f"{pairs[0][:40]!r} is no preset; presets are {', '.join(PRESETS)}")
        weights, pairs = PRESETS[pairs[0]], pairs[1:]
    kinds = {field.name: type(getattr(weights, field.name)) for field in fields(weights)}
    changes: dict[str, float | bool] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in kinds or name in changes:
            raise WeightsInvalid(f"{name[:40]!r} is no weight or comes twice; weights are {', '.join(kinds)}")
        changes[name] = _read_value(name, value, kinds[name])
    return replace(weights, **changes)  # type: ignore[arg-type]  # the kinds are the fields' own


def _read_value(name: str, value: str, kind: type) -> float | bool:
    if kind is bool:
        if value not in ("true", "false"):
            raise WeightsInvalid(f"{name} must be true or false, not {value[:40]!r}")
        return value == "true"
    try:
        return int(value) if kind is int else float(value)
    except ValueError as error:
        raise WeightsInvalid(f"{name} must be a number, not {value[:40]!r}") from error


@dataclass(frozen=True)
class ExpertFacts:
    """What is known of one layer's E experts, float32 in [0, 1]; the same for every token of a step."""

    novelty_E: Tensor
    """1 where an expert was not used lately, 1/2 at an even share of use."""
    trust_E: Tensor
    warmth_E: Tensor
    """1 where an expert is resident, else 0."""


class ScoreFactors(NamedTuple):
    """What scores are made of beside the gate's logits. surprise_T and reward_T may be None where their terms weigh
    nothing."""

    surprise_T: Tensor | None
    reward_T: Tensor | None
    facts: ExpertFacts


@dataclass(frozen=True)
class ScoreTerms:
    """The parts of the snarc scores of T tokens, as `explain` shows them. A term that weighs nothing is None."""

    gate_TE: Tensor
    salience_TE: Tensor | None
    trust_TE: Tensor | None
    warmth_E: Tensor | None

    def total(self) -> Tensor:
        """(T, E) scores. One addition a term: fused ones round otherwise at the end of a buffer."""
        score_TE = self.gate_TE
        for term in (self.salience_TE, self.trust_TE, self.warmth_E):
            score_TE = score_TE if term is None else score_TE + term
        return score_TE


def score_terms(logits_TE: Tensor, factors: ScoreFactors, weights: SnarcWeights) -> ScoreTerms:
    """logits_TE: float32."""
    surprise_T, reward_T, facts = factors
    if weights.is_scaled:
        low_T, high_T = torch.aminmax(logits_TE, dim=-1)
        # Logits that are all equal have no range; then every gate part is equal too.
        scale_T = weights.router / (high_T - low_T).clamp_min(1e-6)
        gate_TE = logits_TE * scale_T.unsqueeze(-1)
    else:
        gate_TE = logits_TE * weights.router
    salience_TE = trust_TE = None
    if weights.novelty and surprise_T is not None:
        salience_TE = surprise_T.unsqueeze(-1) * (facts.novelty_E * weights.novelty)
    if weights.trust and reward_T is not None:
        trust_TE = reward_T.unsqueeze(-1) * (facts.trust_E * weights.trust)
    return ScoreTerms(
        gate_TE, salience_TE, trust_TE, facts.warmth_E * weights.warmth if weights.warmth else None
    )


def route_scored(
    logits_TE: Tensor, score_TE: Tensor, experts_per_token: int, normalise: bool, keep_best: int = 0
) -> Routing:
    """Choose by score, mix by the gate's own probabilities, renormalised where the checkpoint says so.

    keep_best: so many of the token's best experts by its gate are chosen whatever the scores, at the first ranks.
    """
    if keep_best:
        kept_TM = torch.topk(logits_TE, min(keep_best, experts_per_token), dim=-1).indices
        ranks_M = torch.arange(kept_TM.shape[1], 0, -1, dtype=torch.float32)
        score_TE = score_TE.scatter(-1, kept_TM, (_KEPT + ranks_M).expand(kept_TM.shape))
    experts_TK = torch.topk(score_TE, experts_per_token, dim=-1).indices
    weights_TK = torch.softmax(logits_TE, dim=-1).gather(-1, experts_TK)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(experts_TK, weights_TK)
