"""How many actors each group of experts should have: from load, demand, trust and capacity. Pure.

Demand comes first: a group that is asked for has an actor, one whose actors are busy gets a replica. Trust decides
between groups that are asked for equally. A group that is asked for keeps a spare, a second actor that the load does
not need, where answers would otherwise wait too long for its experts if the only one were lost. Where the actors go is
decided by `cluster.autoscaler`, the only caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.capacity import CapacityState, num_actors_at


@dataclass(frozen=True)
class ScalerSettings:
    """When to change what. Times in seconds."""

    max_actors: int
    min_actors: int = 0
    max_replicas: int | None = None
    """Most actors of a group; None for no bound of its own."""
    high_busy: float = 0.6
    """Of its time that an actor computes, above which its group gets a replica."""
    low_busy: float = 0.2
    """Below which one of several would do: what is left must not exceed it."""
    rise_after_s: float = 5.0
    cold_after_s: float = 10.0
    """Without rows, after which a group's memory may go to others."""
    fall_after_s: float = 60.0
    cool_down_s: float = 30.0
    """After a change to a group, before the next one to it. Does not hold where a node leaves."""
    half_life_s: float = 30.0
    """Of the demand that is remembered."""
    least_rows_per_s: float = 0.01
    """Below which nobody asks for a group any more."""
    stall_s: float = 0.5
    """Longest that an answer may wait for experts whose actor is lost, beside the time to notice that: where it would
    be longer, their group keeps a spare."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_actors <= self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is not in 0 to max_actors {self.max_actors}")
        if self.max_replicas is not None and self.max_replicas < 1:
            raise ValueError(f"max_replicas {self.max_replicas} leaves no actor to a group")
        if not 0.0 < self.low_busy < self.high_busy:
            raise ValueError(f"low_busy {self.low_busy} is not in 0 to high_busy {self.high_busy}")


@dataclass(frozen=True)
class GroupLoad:
    """A group since the last look."""

    group: str
    rows_per_s: float
    busy: float
    """Seconds that its actors computed together, per second."""
    group_bytes: int
    least_bytes: int
    """Of one expert: less an actor cannot keep."""
    trust: float = 0.5
    """Mean of its experts', in [0, 1]."""
    fallback_s: float = 0.0
    """How long a router takes to read from its own copy of the store what a token asks of the group. Infinite where no
    router has a copy: such a group is never without an actor."""


@dataclass(frozen=True)
class GroupHistory:
    """What is remembered of a group. Times are of a monotonic clock."""

    rows_per_s: float = 0.0
    """Expected demand: a moving average."""
    high_since_s: float | None = None
    low_since_s: float | None = None
    quiet_since_s: float | None = None
    """Since when nobody has asked for it."""
    changed_at_s: float = float("-inf")

    def quiet_s(self, now_s: float) -> float:
        return 0.0 if self.quiet_since_s is None else now_s - self.quiet_since_s

    def changed(self, now_s: float) -> GroupHistory:
        """After a change to the group."""
        return GroupHistory(self.rows_per_s, quiet_since_s=self.quiet_since_s, changed_at_s=now_s)


@dataclass(frozen=True)
class ScalerState:
    """Between two looks."""

    looked_at_s: float | None = None
    groups: Mapping[str, GroupHistory] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupView:
    """A group at a look."""

    load: GroupLoad
    history: GroupHistory
    count: int
    """Actors that the plan has for it."""
    is_asked: bool
    """Whether anybody is expected to ask for it."""
    is_cold: bool
    """Whether nobody has for long enough that its memory may go to others."""
    is_busy: bool
    """Whether its actors have had more to do than they should for long enough."""
    least: int
    """Actors below which no lack of load brings it."""

    @property
    def name(self) -> str:
        return self.load.group

    @property
    def is_spared(self) -> bool:
        """Whether one of its actors is there for the others' loss and not for the load."""
        return self.least > 1 and not self.is_busy


def view_groups(
    state: ScalerState,
    loads: Iterable[GroupLoad],
    counts: Mapping[str, int],
    num_nodes: int,
    settings: ScalerSettings,
    now_s: float,
) -> list[GroupView]:
    """The most wanted first. loads: of all groups of `counts`, and maybe others. num_nodes: that stay."""
    views = [
        _view(state, load, counts[load.group], num_nodes, settings, now_s)
        for load in loads
        if load.group in counts
    ]
    return sorted(views, key=lambda view: (-view.history.rows_per_s, -view.load.trust, view.name))


def _view(
    state: ScalerState, load: GroupLoad, count: int, num_nodes: int, settings: ScalerSettings, now_s: float
) -> GroupView:
    history = _remember(state, load, count, settings, now_s)
    is_expected = history.rows_per_s >= settings.least_rows_per_s
    is_asked = is_expected and history.quiet_s(now_s) < settings.fall_after_s
    is_cold = not is_expected or history.quiet_s(now_s) >= settings.cold_after_s
    if is_asked and load.fallback_s > settings.stall_s and num_nodes > 1:
        least = 2
    else:
        least = int(load.fallback_s == float("inf"))
    is_busy = history.high_since_s is not None and now_s - history.high_since_s >= settings.rise_after_s
    return GroupView(load, history, count, is_asked, is_cold, is_busy, least)


def _remember(
    state: ScalerState, load: GroupLoad, num_actors: int, settings: ScalerSettings, now_s: float
) -> GroupHistory:
    before = state.groups.get(load.group)
    if before is None or state.looked_at_s is None:
        before = GroupHistory(load.rows_per_s)
        weight = 1.0
    else:
        weight = 1.0 - 0.5 ** ((now_s - state.looked_at_s) / settings.half_life_s)
    is_quiet = load.rows_per_s < settings.least_rows_per_s
    is_high = num_actors > 0 and load.busy > settings.high_busy * num_actors
    is_low = load.busy <= settings.low_busy * (num_actors - 1) if num_actors > 1 else is_quiet
    return GroupHistory(
        before.rows_per_s + weight * (load.rows_per_s - before.rows_per_s),
        _since(before.high_since_s, is_high, now_s),
        _since(before.low_since_s, is_low, now_s),
        _since(before.quiet_since_s, is_quiet, now_s),
        before.changed_at_s,
    )


def _since(before_s: float | None, is_so: bool, now_s: float) -> float | None:
    if not is_so:
        return None
    return now_s if before_s is None else before_s


def wanted_counts(
    views: Sequence[GroupView], capacity: CapacityState, settings: ScalerSettings, now_s: float
) -> dict[str, int]:
    """How many actors each group should have. views: the most wanted first."""
    counts = {view.name: view.count for view in views}
    if capacity == "rest":
        wanted = {view.name: int(view.load.fallback_s == float("inf")) for view in views}
    else:
        most = settings.max_actors if settings.max_replicas is None else settings.max_replicas
        wanted = {view.name: min(most, _group_wants(view, settings, now_s)) for view in views}
        # The state bounds growth only: what runs goes when it is idle for long.
        needed = sum(max(view.least, int(wanted[view.name] > 0)) for view in views)
        ceiling = max(needed, sum(counts.values()), num_actors_at(capacity, settings.max_actors))
        _cut(wanted, [view.name for view in views], min(settings.max_actors, ceiling))
    for name in wanted:  # the floor: of what runs, the most wanted stays
        missing = settings.min_actors - sum(wanted.values())
        wanted[name] += max(0, min(missing, counts[name] - wanted[name]))
    return wanted


def _group_wants(view: GroupView, settings: ScalerSettings, now_s: float) -> int:
    history, count = view.history, view.count
    if count == 0:
        return max(int(view.is_asked), view.least)
    if now_s - history.changed_at_s < settings.cool_down_s:
        return count
    if view.is_busy:
        return count + 1
    if history.low_since_s is not None and now_s - history.low_since_s >= settings.fall_after_s:
        count -= 1
    return max(count, view.least)


def _cut(wanted: dict[str, int], order: Sequence[str], ceiling: int) -> None:
    """Take replicas away first, then whole groups, the least wanted first."""
    for least in (1, 0):
        for name in reversed(order):
            excess = sum(wanted.values()) - ceiling
            if excess > 0:
                wanted[name] -= max(0, min(excess, wanted[name] - least))
