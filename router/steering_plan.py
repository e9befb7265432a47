"""What a step's rows are to be routed by: made once a step from their requests, followed in every layer.

A pure grouping over the state that `router.steering` keeps of each steered request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router.effort import EFFORTS, Effort, EffortControl, experts_at
from router.request import GenerationRequest
from router.routing_choice import MAX_EXPLAINED, ExplainedLayer, PolicyName
from router.step_routing import SpanOwner


@dataclass
class SteeredRequest:
    """What is kept of a request whose routing is not the plain one, from its first step to its end."""

    request: GenerationRequest
    control: EffortControl = field(default_factory=EffortControl)
    effort_at: dict[int, Effort] = field(default_factory=dict)
    """Of `auto`: the effort of a position that was decided by the one before."""
    num_followed: int = 0
    """Positions whose signals `auto` has followed. Computing one again does not count."""
    num_explained: int = 0
    """Positions that were explained or left out."""
    tokens_at: dict[Effort, int] = field(default_factory=lambda: dict.fromkeys(EFFORTS, 0))
    misses: int = 0
    stand_ins: int = 0
    num_explained_layers: int = 0
    """(position, layer) pairs that were explained, at most MAX_EXPLAINED."""
    explained: list[ExplainedLayer] = field(default_factory=list)
    """Of those, what was not handed over yet."""
    is_cut: bool = False

    def __post_init__(self) -> None:
        self.effort_at.update(enumerate(self.request.generated_efforts, len(self.request.prompt_ids)))

    @property
    def newest_effort(self) -> tuple[Effort, ...]:
        """Of `auto`: of the token that the position followed last will be followed by."""
        return (self.effort(self.num_followed),) if self.request.routing.effort == "auto" else ()

    @property
    def num_known(self) -> int:
        """Tokens that the request came with and no effort was chosen for: `auto` gives them the native number of
        experts."""
        request = self.request
        return len(request.prompt_ids) + (0 if request.generated_efforts else len(request.generated_ids))

    def add_explained(self, entries: Sequence[ExplainedLayer], end: int) -> None:
        """After a step: what it has explained of the positions before `end`."""
        self.explained += entries
        self.num_explained_layers += len(entries)
        self.num_explained = max(end, self.num_explained)

    def take_explained(self) -> tuple[ExplainedLayer, ...]:
        taken, self.explained = tuple(self.explained), []
        return taken

    def effort(self, position: int) -> Effort:
        chosen = self.request.routing.effort
        return self.effort_at.get(position, "focus") if chosen == "auto" else chosen


@dataclass(frozen=True)
class SteeredSpan:
    """Consecutive rows of one steered request."""

    state: SteeredRequest
    row: int
    first: int
    count: int


@dataclass(frozen=True)
class ExplainedRow:
    """A row that is to be explained."""

    index: int
    """Within its group."""
    row: int
    position: int
    state: SteeredRequest


@dataclass(frozen=True)
class RowGroup:
    """Rows that are routed alike."""

    policy: PolicyName
    experts_per_token: int
    is_native: bool
    """Whether this is the published model's routing."""
    rows: Tensor | None
    """int64; None means all rows of the step."""
    explained: tuple[ExplainedRow, ...] = ()


@dataclass(frozen=True)
class SteeringPlan:
    """One step's."""

    groups: tuple[RowGroup, ...]
    spans: tuple[SteeredSpan, ...]
    num_rows: int

    @property
    def is_plain(self) -> bool:
        return not self.spans


PLAIN = SteeringPlan((), (), 0)


def plan_steering(
    owners: Sequence[SpanOwner], states: dict[str, SteeredRequest], native_k: int, num_experts: int
) -> SteeringPlan:
    """Group a step's rows by policy and number of experts. states: of the steered requests among the owners.

    Counts the tokens of each effort in the states.
    """
    if not states:
        return PLAIN
    spans: list[SteeredSpan] = []
    rows_of: dict[tuple[PolicyName, int], list[int]] = {}
    explained: dict[int, tuple[int, SteeredRequest]] = {}
    row = 0
    for owner in owners:
        state = states.get(owner.request.request_id)
        rows = range(row, row + owner.count)
        if state is None:
            rows_of.setdefault(("native", native_k), []).extend(rows)
        else:
            spans.append(SteeredSpan(state, row, owner.first, owner.count))
            for position, steered_row in enumerate(rows, owner.first):
                effort = state.effort(position)
                state.tokens_at[effort] += 1
                key = state.request.routing.policy, experts_at(effort, native_k, num_experts)
                rows_of.setdefault(key, []).append(steered_row)
            explained.update({span_row: (p, state) for span_row, p in _to_explain(state, owner, rows.start)})
        row = rows.stop
    groups = [_group(key, rows, row, native_k, explained) for key, rows in rows_of.items()]
    return SteeringPlan(tuple(groups), tuple(spans), row) if spans else PLAIN


def _to_explain(state: SteeredRequest, owner: SpanOwner, row: int) -> list[tuple[int, int]]:
    """(row, position) of what the request has not had explained yet, while there is room."""
    if not state.request.routing.is_explained:
        return []
    first = max(owner.first, state.num_explained)
    end = owner.first + owner.count
    if state.num_explained_layers >= MAX_EXPLAINED:
        state.is_cut = state.is_cut or first < end
        return []
    return [(row + position - owner.first, position) for position in range(first, end)]


def _group(
    key: tuple[PolicyName, int],
    rows: list[int],
    num_rows: int,
    native_k: int,
    explained: dict[int, tuple[int, SteeredRequest]],
) -> RowGroup:
    policy, k = key
    shown = tuple(
        ExplainedRow(index, row, *explained[row]) for index, row in enumerate(rows) if row in explained
    )
    is_all = len(rows) == num_rows
    return RowGroup(
        policy, k, policy == "native" and k == native_k, None if is_all else torch.tensor(rows), shown
    )
