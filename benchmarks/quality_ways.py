"""The ways of routing that docs/quality.md compares, and one evaluation of each: misses and perplexity against native.

Used by `benchmarks.quality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from experts.budget import BudgetRequest
from experts.eviction import DEFAULT_EVICTION, Eviction
from gateway.byte_sizes import parse_budget
from gateway.evaluation.run import EvalOptions, Evaluation
from gateway.evaluation.statistics import Cluster, Estimate, compare
from gateway.evaluation.windows import Sliding
from router.routing_choice import NATIVE_CHOICE, RoutingChoice
from router.scoring import PRESETS, SnarcWeights

SNARC = RoutingChoice("snarc")
GATE_ONLY = SnarcWeights(router=1.0, novelty=0.0, trust=0.0, warmth=0.0)
SCALED = PRESETS["scaled"]


@dataclass(frozen=True)
class Way:
    """How tokens get their experts."""

    routing: RoutingChoice = NATIVE_CHOICE
    weights: SnarcWeights = SCALED
    eviction: Eviction = DEFAULT_EVICTION

    def options(self, sliding: Sliding, budget: str) -> EvalOptions:
        """One decoding stream, with a cache of that size."""
        budgets: tuple[BudgetRequest, ...] = (parse_budget(budget),)
        return EvalOptions(
            sliding,
            budgets=budgets,
            eviction=self.eviction,
            routing=self.routing,
            snarc=self.weights,
            is_one_stream=True,
        )


FRONTIER = {
    "native, lfu": Way(),
    "warmth 0.1": Way(SNARC, replace(GATE_ONLY, warmth=0.1)),
    "warmth 0.2": Way(SNARC, replace(GATE_ONLY, warmth=0.2)),
    "thrifty": Way(SNARC, PRESETS["thrifty"]),
    "scaled": Way(SNARC, SCALED),
}
"""Compared at every one of SHARES."""
SHARES = ("12.5%", "25%", "50%")
SINGLE = {
    "seed": Way(SNARC, PRESETS["seed"]),
    "WAKE": Way(RoutingChoice("native", "wake")),
    "CRISIS": Way(RoutingChoice("native", "crisis")),
    "thrifty without warmth": Way(SNARC, replace(PRESETS["thrifty"], warmth=0.0)),
    "thrifty without stand-ins": Way(SNARC, replace(PRESETS["thrifty"], stand_in=0.0)),
    "scaled without novelty": Way(SNARC, replace(SCALED, novelty=0.0)),
    "scaled without warmth": Way(SNARC, replace(SCALED, warmth=0.0)),
}
SINGLE_SHARE = "25%"


def windows_of(evaluation: Evaluation) -> list[list[tuple[int, float]]]:
    """(tokens, nll) of every window, text by text: what other ways are compared with."""
    return [[(c.num_tokens, c.nll) for c in score.clusters] for score in evaluation.texts]


def against(evaluation: Evaluation, base: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Misses, and the perplexity as a multiple of the native one: of all texts, and of each."""
    ours = [score.clusters for score in evaluation.texts]
    theirs = [[Cluster(int(tokens), nll) for tokens, nll in text] for text in base]
    counts = [score.experts for score in evaluation.texts]
    texts = {
        score.text.name: {
            **_ratio(compare([ours[number]], [theirs[number]])),
            **_shares([counts[number]]),
        }
        for number, score in enumerate(evaluation.texts)
    }
    return {**_ratio(compare(ours, theirs)), **_shares(counts), "texts": texts}


def _ratio(found: Estimate) -> dict[str, Any]:
    return {"perplexity_to_native": found.ratio, "perplexity_to_native_95": found.ratio_95}


def _shares(counts: Sequence[Any]) -> dict[str, Any]:
    uses = sum(count.hits + count.misses + count.stand_ins for count in counts)
    return {
        "uses": uses,
        "miss_rate": sum(count.misses for count in counts) / uses,
        "stand_in_rate": sum(count.stand_ins for count in counts) / uses,
    }
