"""The one place that says how an answer relates to the published model: the object `sage` of every answer.

"exact" is the published model, bit for bit within its numerics class. Anything else is "modified" and says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.effort import EFFORTS, experts_at, present_effort
from router.routing_choice import ExplainedLayer, RoutingReport

EXACT = "exact"
MODIFIED = "modified"
MIXED = "mixed"
"""The answer's rows are of more than one numerics class, and equal a single one's within docs/exactness.md's
tolerance, not bit for bit."""
SIGNALS = ("surprise", "novelty", "arousal", "reward", "conflict")


def describe_quality(
    reports: Sequence[RoutingReport], quantization: str | None = None, *, is_mixed: bool = False
) -> dict[str, Any]:
    """quality, and for a modified answer its policy, effort, k, misses and stand-ins. reports: of the answer's
    sequences that had one. quantization: of the weights, None where they are as published. is_mixed: whether experts of
    another numerics class took part. Explanations are added for those that asked for them."""
    described: dict[str, Any] = {"quality": EXACT}
    if quantization is not None:
        described = {"quality": MODIFIED, "quantization": quantization}
    modified = [report for report in reports if _is_modified(report)]
    if modified:
        described |= {"quality": MODIFIED, **_describe_routing(modified)}
    if is_mixed:
        described["numerics"] = MIXED
    explained = [_explanation(report) for report in reports if report.choice.is_explained]
    return described | ({"explain": explained} if explained else {})


def _is_modified(report: RoutingReport) -> bool:
    """An effort that comes to the native number of experts changes nothing."""
    k_of = (experts_at(effort, report.native_k, report.num_experts) for effort in EFFORTS)
    changed = (num and k != report.native_k for num, k in zip(report.tokens_at, k_of, strict=True))
    return report.choice.policy != "native" or any(changed)


def _describe_routing(reports: Sequence[RoutingReport]) -> dict[str, Any]:
    """k is the number of experts of each token, their mean where it changed."""
    first = reports[0]
    native_k, num_experts = first.native_k, first.num_experts
    tokens = [sum(report.tokens_at[i] for report in reports) for i in range(len(EFFORTS))]
    used = {effort: num for effort, num in zip(EFFORTS, tokens, strict=True) if num}
    uses = sum(num * experts_at(effort, native_k, num_experts) for effort, num in used.items())
    mean_k = uses / max(sum(used.values()), 1)
    is_auto = first.choice.effort == "auto"
    shown = {present_effort(effort, native_k, num_experts): num for effort, num in used.items()}
    num_resumed = sum(report.num_resumed for report in reports)
    resumed = {"resumed": num_resumed} if num_resumed else {}
    return resumed | {
        "policy": first.choice.policy,
        "effort": "auto" if is_auto else next(iter(shown), first.choice.effort),
        "k": int(mean_k) if mean_k.is_integer() else round(mean_k, 3),
        "tokens_at": shown,
        "expert_uses": uses * first.num_layers,
        "misses": sum(report.misses for report in reports),
        "stand_ins": sum(report.stand_ins for report in reports),
    }


def _explanation(report: RoutingReport) -> dict[str, Any]:
    """Of one sequence: its tokens in order, each with its layers."""
    tokens: dict[int, list[dict[str, Any]]] = {}
    for entry in report.explained:
        tokens.setdefault(entry.position, []).append(_layer(entry))
    shown = [{"position": position, "layers": tokens[position]} for position in sorted(tokens)]
    return {"tokens": shown, "is_cut": report.is_cut}


def _layer(entry: ExplainedLayer) -> dict[str, Any]:
    return {
        "layer": entry.layer,
        "experts": [expert._asdict() for expert in entry.experts],
        "signals": dict(zip(SIGNALS, entry.signals, strict=True)),
    }
