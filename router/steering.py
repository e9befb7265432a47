"""The routing policy of a service whose requests may choose: native or snarc, with any effort, mixed in one batch.

A native request's rows are routed by the same operations as without this policy, on the same rows, so they keep their
bits beside any neighbours. What is kept of the others (signals, effort, counters, explanations) begins with their first
row and is handed over in `RoutingReport`s with their tokens. Called by the engine on its thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router.choosing import Choice, Chooser, ResidentChooser
from router.effort import follow
from router.expert_facts import FactSource
from router.explanation import explain
from router.native_signals import conflict_of
from router.output_means import OutputMeans
from router.routing_choice import ExplainedLayer, RoutingReport
from router.scoring import (
    ABSENT,
    Routing,
    ScoreFactors,
    ScoreTerms,
    SnarcWeights,
    StandIns,
    score_terms,
)
from router.signal_memory import MemorySpan, RecallIndex, SignalMemory
from router.snarc import Signals, Sketch, conflict
from router.steering_plan import PLAIN, RowGroup, SteeredRequest, SteeredSpan, SteeringPlan, plan_steering
from router.step_routing import MAX_UNDER_WAY, GateOutput, SpanOwner


@dataclass(frozen=True)
class MoeShape:
    """What steering needs to know of the model."""

    hidden_size: int
    num_experts: int
    experts_per_token: int
    layers: tuple[int, ...]
    """Those with experts, ascending."""


@dataclass(frozen=True)
class SignalNeeds:
    """Which signals somebody in the step asks for."""

    surprise: bool = False
    novelty: bool = False
    arousal: bool = False
    reward: bool = False
    conflict: bool = False

    @property
    def of_past(self) -> bool:
        return self.surprise or self.novelty or self.arousal


@dataclass
class _Step:
    """One step in progress."""

    owners: Sequence[SpanOwner]
    plan: SteeringPlan = PLAIN
    needs: SignalNeeds = SignalNeeds()
    index: RecallIndex | None = None
    signal_rows: Tensor | None = None
    """Rows of the steered requests; None means all."""
    fixed_reward_R: Tensor | None = None
    """Of the signal rows, the feedback's reward, or NaN where there is none."""
    choices: list[list[Choice]] = field(default_factory=list)
    """Of each group, layer by layer; counted at the step's end, all layers at once."""
    explained: dict[str, list[ExplainedLayer]] = field(default_factory=dict)
    """By request; theirs when the step has ended."""
    drive_2R: Tensor | None = None
    """Arousal and conflict of the signal rows, summed over the layers so far."""


class SteeredPolicy:
    """See `router.step_routing.RoutingPolicy` and `RoutingReporter`."""

    def __init__(
        self, shape: MoeShape, facts: FactSource, weights: SnarcWeights, means: OutputMeans | None = None
    ) -> None:
        """means: stand in where the weights let them; the engine must let them watch."""
        self._shape, self._facts, self._weights = shape, facts, weights
        self.means = means
        self.chooser: Chooser = ResidentChooser(weights, means)
        self._memory = SignalMemory(Sketch.for_width(shape.hidden_size), len(shape.layers))
        self._numbers = {layer: number for number, layer in enumerate(shape.layers)}
        self._requests: dict[str, SteeredRequest] = {}
        self._step = _Step(())
        self._under_way: list[_Step] = []
        """Steered steps that have begun and not ended, oldest first."""
        self._is_use_counted = False
        """From the first snarc request on: a service that never has one pays nothing."""

    @property
    def num_open(self) -> int:
        """Requests of which something is kept."""
        return len(self._requests)

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        """See RoutingPolicy."""
        return self._step_of(owners).plan.is_plain and not self._is_use_counted

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing:
        """See RoutingPolicy."""
        step = self._step_of(owners)
        routing = gate.native() if step.plan.is_plain else self._route_steered(step, gate)
        if self._is_use_counted:
            self._facts.count_use(gate.layer, routing)
        if not step.plan.is_plain and gate.layer == self._shape.layers[-1]:
            self._end_step(step)
        return routing

    def forget(self, request_id: str) -> None:
        """See RoutingReporter."""
        if self._requests.pop(request_id, None) is not None:
            self._memory.forget(request_id)

    def abandon(self, owners: Sequence[SpanOwner]) -> None:
        """See RoutingReporter."""
        self._under_way = [step for step in self._under_way if step.owners is not owners]

    def report(self, request_id: str) -> RoutingReport | None:
        """See RoutingReporter. None for a plain request, and for one that had no step."""
        state = self._requests.get(request_id)
        if state is None:
            return None
        explained = state.take_explained()
        wake, focus, crisis = state.tokens_at.values()
        shape = self._shape
        return RoutingReport(
            state.request.routing,
            shape.experts_per_token,
            shape.num_experts,
            len(shape.layers),
            (wake, focus, crisis),
            state.misses,
            state.stand_ins,
            explained,
            state.is_cut,
            state.newest_effort,
        )

    def _step_of(self, owners: Sequence[SpanOwner]) -> _Step:
        if self._step.owners is not owners:
            paused = next((step for step in self._under_way if step.owners is owners), None)
            self._step = paused or self._begin(owners)
        return self._step

    def _begin(self, owners: Sequence[SpanOwner]) -> _Step:
        for owner in owners:
            request = owner.request
            if not request.routing.is_plain and request.request_id not in self._requests:
                self._requests[request.request_id] = SteeredRequest(request)
        shape = self._shape
        plan = plan_steering(owners, self._requests, shape.experts_per_token, shape.num_experts)
        if plan.is_plain:
            return _Step(owners)
        step = _Step(owners, plan, self._needs(plan.spans), choices=[[] for _ in plan.groups])
        if step.needs != SignalNeeds():
            self._index_signals(step)
        if any(group.policy == "snarc" for group in plan.groups):
            self._is_use_counted = self._weights.novelty > 0
            if self.means is not None:
                self.means.is_learning = True
        self._under_way = [*self._under_way, step][-MAX_UNDER_WAY:]
        return step

    def _needs(self, spans: Sequence[SteeredSpan]) -> SignalNeeds:
        choices = [span.state.request.routing for span in spans]
        is_snarc = any(choice.policy == "snarc" for choice in choices)
        is_auto = any(choice.effort == "auto" for choice in choices)
        is_all = any(choice.is_explained for choice in choices)
        has_reward = is_snarc and self._weights.trust > 0
        return SignalNeeds(
            surprise=is_all or (is_snarc and self._weights.novelty > 0),
            novelty=is_all,
            arousal=is_all or is_auto,
            reward=is_all or has_reward,
            conflict=is_all or is_auto,
        )

    def _index_signals(self, step: _Step) -> None:
        spans = step.plan.spans
        counts = [span.count for span in spans]
        step.index = self._memory.index(
            [
                MemorySpan(s.state.request.request_id, len(s.state.request.prompt_ids), s.first, s.count)
                for s in spans
            ]
        )
        if sum(counts) < step.plan.num_rows:
            step.signal_rows = torch.cat([torch.arange(span.row, span.row + span.count) for span in spans])
        rewards = [span.state.request.routing.reward for span in spans]
        if any(given is not None for given in rewards):
            values = torch.tensor([float("nan") if given is None else given for given in rewards])
            step.fixed_reward_R = values.repeat_interleave(torch.tensor(counts))

    def _route_steered(self, step: _Step, gate: GateOutput) -> Routing:
        logits_TE = gate.logits_TE.float()
        signals = self._signals(step, gate, logits_TE) if step.index is not None else Signals()
        residents = self._facts.residents(gate.layer)
        parts = []
        for group, choices in zip(step.plan.groups, step.choices, strict=True):
            if group.is_native and not group.explained:
                parts.append(_rows_of(gate.native(), group.rows))
                continue
            logits_RE = _picked(logits_TE, group.rows)
            factors = choice = None
            if group.policy == "snarc":
                factors = self._factors(group, gate.layer, signals, residents.warmth_E)
            if group.is_native:
                chosen = routing = _rows_of(gate.native(), group.rows)
            else:
                choice = self.chooser.choose(gate, logits_RE, factors, group.experts_per_token, residents)
                chosen, routing = choice.chosen, choice.routing
                choices.append(choice)
            if group.explained:
                shown = ScoreTerms(logits_RE, None, None, None)
                if factors is not None:
                    shown = score_terms(logits_RE, factors, self._weights)
                spared_RK = choice.spared_RK if choice else None
                explain(group, gate.layer, chosen, shown, signals, spared_RK, found_so_far=step.explained)
            parts.append(routing)
        return _merged(step.plan, parts)

    def _factors(self, group: RowGroup, layer: int, signals: Signals, warmth_E: Tensor) -> ScoreFactors:
        return ScoreFactors(
            None if signals.surprise_T is None else _picked(signals.surprise_T, group.rows),
            None if signals.reward_T is None else _picked(signals.reward_T, group.rows),
            self._facts.facts(layer, warmth_E),
        )

    def _signals(self, step: _Step, gate: GateOutput, logits_TE: Tensor) -> Signals:
        """Of the step's T rows; those of plain requests have zeros."""
        assert step.index is not None
        needs, layer = step.needs, self._numbers[gate.layer]
        surprise_R = novelty_R = arousal_R = reward_R = conflict_R = None
        if needs.of_past:
            hidden_RD = _picked(gate.hidden_TD.cpu(), step.signal_rows)
            asked = needs.surprise, needs.novelty, needs.arousal
            surprise_R, novelty_R, arousal_R = self._memory.follow(
                layer, step.index, hidden_RD, asked, gate.level
            )
        if needs.reward:
            reward_R = self._memory.settled_reward(layer, step.index)
        if needs.conflict or (needs.reward and reward_R is None):
            logits_RE = _picked(logits_TE, step.signal_rows)
            conflict_R = conflict(logits_RE) if gate.level is None else conflict_of(gate.level, logits_RE)
            if needs.reward and reward_R is None:
                reward_R = self._memory.recall_reward(layer, step.index, 1.0 - conflict_R)
        if reward_R is not None and step.fixed_reward_R is not None:
            reward_R = torch.where(step.fixed_reward_R.isnan(), reward_R, step.fixed_reward_R)
        if arousal_R is not None and conflict_R is not None:
            drive_2R = torch.stack((arousal_R, conflict_R))
            step.drive_2R = drive_2R if step.drive_2R is None else step.drive_2R + drive_2R
        found = (surprise_R, novelty_R, arousal_R, reward_R, conflict_R)
        return Signals(*(_spread(signal, step.signal_rows, step.plan.num_rows) for signal in found))

    def _end_step(self, step: _Step) -> None:
        """Remember the rows, count misses, and let `auto` follow the signals of the tokens, in position order."""
        self._under_way = [other for other in self._under_way if other is not step]
        if step.index is not None:
            self._memory.keep(step.index)
        misses, spared = _counted(step)
        drives: list[list[float]] = []
        if step.drive_2R is not None:
            drives = (step.drive_2R / len(self._shape.layers)).T.tolist()
        index = 0
        for span in step.plan.spans:
            explained = step.explained.get(span.state.request.request_id, ())
            span.state.add_explained(explained, span.first + span.count)
            span.state.misses += sum(misses[span.row : span.row + span.count])
            span.state.stand_ins += sum(spared[span.row : span.row + span.count])
            if span.state.request.routing.effort == "auto":
                _follow_span(span, drives[index : index + span.count])
            index += span.count


def _follow_span(span: SteeredSpan, drives: Sequence[Sequence[float]]) -> None:
    state = span.state
    for position, (arousal_mean, conflict_mean) in enumerate(drives, span.first):
        if position >= state.num_followed:
            is_free = position + 1 >= state.num_known
            state.control = follow(state.control, arousal_mean, conflict_mean, is_free=is_free)
            state.num_followed = position + 1
            if is_free:
                state.effort_at.setdefault(position + 1, state.control.effort)


def _counted(step: _Step) -> tuple[list[int], list[int]]:
    """Of each of the step's rows, in all layers: experts that were missed, and that something stood in for."""
    num_rows = step.plan.num_rows
    found_2T = torch.zeros(2, num_rows, dtype=torch.int64)
    for group, choices in zip(step.plan.groups, step.choices, strict=True):
        if not choices:
            continue
        rows = torch.arange(num_rows) if group.rows is None else group.rows
        cold_LRK = torch.stack([choice.cold_RK for choice in choices])
        spared = [choice.spared_RK for choice in choices if choice.spared_RK is not None]
        spared_R = torch.stack(spared).sum((0, 2)) if spared else torch.zeros(len(rows), dtype=torch.int64)
        found_2T[:, rows] = torch.stack((cold_LRK.sum((0, 2)) - spared_R, spared_R))
    misses, stand_ins = found_2T.tolist()
    return misses, stand_ins


def _picked(rows: Tensor, wanted: Tensor | None) -> Tensor:
    return rows if wanted is None else rows.index_select(0, wanted)


def _rows_of(routing: Routing, rows: Tensor | None) -> Routing:
    return Routing(_picked(routing.experts_TK, rows), _picked(routing.weights_TK, rows))


def _spread(signal_R: Tensor | None, rows: Tensor | None, num_rows: int) -> Tensor | None:
    if signal_R is None or rows is None:
        return signal_R
    return signal_R.new_zeros(num_rows).index_copy_(0, rows, signal_R)


def _merged(plan: SteeringPlan, parts: Sequence[Routing]) -> Routing:
    """The groups' routings as one, as wide as the widest."""
    if len(parts) == 1:
        return parts[0]
    width = max(group.experts_per_token for group in plan.groups)
    experts_TK = torch.full((plan.num_rows, width), ABSENT)
    weights_TK = torch.zeros(plan.num_rows, width)
    has_absent = False
    stand_ins: list[StandIns] = []
    for group, part in zip(plan.groups, parts, strict=True):
        k = group.experts_per_token
        experts_TK[group.rows, :k] = part.experts_TK
        weights_TK[group.rows, :k] = part.weights_TK
        has_absent = has_absent or part.has_absent or k < width
        if part.stand_ins is not None:
            assert group.rows is not None
            stand_ins.append(StandIns(group.rows[part.stand_ins.rows_N], part.stand_ins.output_ND))
    both = StandIns(*map(torch.cat, zip(*stand_ins, strict=True))) if stand_ins else None
    return Routing(experts_TK, weights_TK, has_absent, both)
