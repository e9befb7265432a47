"""How many bytes of experts a node may hold: what a user asks for, and what that comes to. Pure.

A request is a number of bytes, a percentage of the served component's experts as they are loaded, or `fit`: as much
as the node has room for. `gateway.byte_sizes` reads it, `cluster.memory_plan` resolves and divides it,
`experts.worker` keeps to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from experts.errors import BudgetTooSmall
from extraction.manifest import ExpertKey

if TYPE_CHECKING:
    from experts.quantised import RecordForm
    from experts.store import ExpertStore


@dataclass(frozen=True)
class BudgetRequest:
    """What a user asks for; with neither number it is `fit`."""

    num_bytes: int | None = None
    share: Fraction | None = None
    """Of all experts, above 0 and at most 1."""

    def __post_init__(self) -> None:
        assert self.num_bytes is None or self.share is None

    @property
    def is_fit(self) -> bool:
        return self.num_bytes is None and self.share is None


FIT = BudgetRequest()


@dataclass(frozen=True)
class ExpertBytes:
    """What a set of experts takes in memory, in the dtype that is computed in."""

    total: int
    largest: int
    """Of one expert; what every budget must hold."""


def measure_experts(store: ExpertStore, keys: Iterable[ExpertKey], form: RecordForm[object]) -> ExpertBytes:
    sizes = [form.loaded_bytes(store.record(key)) for key in keys]
    return ExpertBytes(sum(sizes), max(sizes, default=0))


def resolve_budget(requests: Iterable[BudgetRequest], experts: ExpertBytes, room_bytes: int) -> int:
    """Bytes that the requests come to together: the sum, or the room where one of them is `fit`.

    room_bytes: what the node has room for, at most what is of use.
    Raises BudgetTooSmall below one expert.
    """
    total = 0
    for request in requests:
        if request.is_fit:
            total = room_bytes
            break
        total += request.num_bytes or 0
        total += int(experts.total * request.share) if request.share else 0
    if total < experts.largest:
        raise BudgetTooSmall(max(0, total), experts.largest)
    return total


def share_of(share: Fraction, num_bytes: int) -> int:
    """A share of some bytes, rounded up."""
    return math.ceil(share * num_bytes)
