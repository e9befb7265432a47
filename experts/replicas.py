"""Who is asked for an expert, of all that can compute it: two pure decisions.

`rank` says who may be asked, best first, and changes only with roster and connections; `choose` takes one of equals for
each expert of a call. Called by `experts.remote_directory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experts.shares import Place

MESSAGE_S = 100e-6
"""What one more message in a call counts: framing, sending and receiving at both ends, less what overlaps with the
other messages. See benchmarks/bench_transport.py."""
NO_LOAD_ROW_S = 10e-6
"""Taken for the time of a row where nothing was measured yet, or lately."""

Tiers = tuple[tuple[Place, ...], ...]
"""Best first; those in one tier are as good as each other, but for their load. None (here) stands alone."""


@dataclass(frozen=True)
class Reach:
    """Who can be asked now."""

    present: frozenset[str]
    """Actors with an open connection."""
    class_of: Mapping[str, str]
    """Numerics class of each actor that is, or lately was, connected."""
    own_class: str


def wanted_class(owners: Sequence[str], reach: Reach) -> str:
    """The class in which an expert's rows are computed while nothing is lost: this process's if it has no owner, or
    some owner has it, else that of the first owner whose class is known."""
    classes = [reach.class_of[name] for name in owners if name in reach.class_of]
    return reach.own_class if reach.own_class in classes or not classes else classes[0]


def rank(owners: Sequence[str], fallbacks: Sequence[str], reach: Reach) -> Tiers:
    """Owners, then actors with a copy on their disk, then this process; all of the wanted class before all others.

    An expert without owners belongs to this process, which then comes before the copies.
    """
    wanted = wanted_class(owners, reach)
    copies = tuple(name for name in fallbacks if name not in owners)

    def of_class(names: Sequence[str], is_wanted: bool) -> tuple[Place, ...]:
        return tuple(
            name for name in names if name in reach.present and (reach.class_of[name] == wanted) == is_wanted
        )

    tiers: list[tuple[Place, ...]] = []
    for is_wanted in (True, False):
        here: tuple[Place, ...] = (None,) if (reach.own_class == wanted) == is_wanted else ()
        last = [of_class(copies, is_wanted), here]
        tiers += [of_class(owners, is_wanted), *(last if owners else reversed(last))]
    return tuple(tier for tier in tiers if tier)


def best_left(tiers: Tiers, tried: frozenset[Place]) -> tuple[Place, ...]:
    """The best tier that has somebody who was not tried, less those who were; empty where nobody is left."""
    for tier in tiers:
        if left := tuple(place for place in tier if place not in tried):
            return left
    return ()


@dataclass(frozen=True)
class ActorLoad:
    """How busy an actor is."""

    outstanding_rows: int = 0
    """Asked and not answered yet."""
    row_s: float = NO_LOAD_ROW_S
    """Time that a row has lately taken."""


def choose(
    counts: Sequence[int], equals: Sequence[tuple[Place, ...]], load_of: Callable[[str], ActorLoad]
) -> list[Place]:
    """One place for each expert of a call. counts: rows of each expert; equals: who is as good for it.

    Few messages, little imbalance: the experts with most rows first, each goes where it would be done soonest, where an
    actor that is not asked yet takes MESSAGE_S longer. Between equals the earlier one. Costs nothing where there is no
    choice, else O(experts x equals).
    """
    places: list[Place] = [tier[0] for tier in equals]
    free = [index for index, tier in enumerate(equals) if len(tier) > 1]
    if not free:
        return places
    loads = {name: load_of(name) for name in {name for index in free for name in equals[index]} if name}
    row_s = {name: load.row_s for name, load in loads.items()}
    ready_s = {name: MESSAGE_S + load.outstanding_rows * load.row_s for name, load in loads.items()}
    """When an actor could begin; MESSAGE_S later while it is not asked."""
    unasked = set(loads)

    def give(index: int, name: str) -> None:
        places[index] = name
        ready_s[name] += counts[index] * row_s[name]
        if name in unasked:
            unasked.remove(name)
            ready_s[name] -= MESSAGE_S

    for index, tier in enumerate(equals):
        if len(tier) == 1 and tier[0] is not None and tier[0] in loads:
            give(index, tier[0])
    for index in sorted(free, key=counts.__getitem__, reverse=True):
        count, best, soonest_s = counts[index], "", math.inf
        for name in equals[index]:
            assert name is not None, "this process stands alone in its tier"
            end_s = ready_s[name] + count * row_s[name]
            if end_s < soonest_s:
                best, soonest_s = name, end_s
        give(index, best)
    return places
