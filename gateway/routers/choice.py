"""Which router a request goes to, and when a router is given up for lost: pure decisions. Called by
`gateway.routers.pool`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterLoad:
    """What a gateway knows of one router. Times are of a monotonic clock, in seconds."""

    num_requests: int
    """Of this gateway, open."""
    num_tokens: int
    """Of their prompts and answers so far."""
    groups: frozenset[str] = frozenset()
    """Of the open requests: those of one group share a prompt's keys and values."""
    lost_at_s: float | None = None
    """When it last failed, until it answers that it is ready."""
    unready_since_s: float | None = None
    """Since when it has not answered that it is ready."""


def choose_router(loads: Sequence[RouterLoad], group: str | None, full: Collection[int]) -> int | None:
    """Index of the router for one more request: where its group is, else the one with the fewest requests, of equals
    with the fewest tokens, of equals the first. None where all that could take it are full.

    full: routers that have just refused it. Routers that are lost come in question only where all are, the one that
    failed longest ago first: it is the likeliest to be back.
    """
    alive = [index for index, load in enumerate(loads) if load.lost_at_s is None]
    candidates = [index for index in alive or range(len(loads)) if index not in full]

    def cost(index: int) -> tuple[float, bool, int, int]:
        load = loads[index]
        is_apart = group is None or group not in load.groups
        return (load.lost_at_s or 0.0, is_apart, load.num_requests, load.num_tokens)

    return min(candidates, key=cost, default=None)


def routers_to_leave(loads: Sequence[RouterLoad], now_s: float, patience_s: float) -> list[int]:
    """Routers whose requests are better off elsewhere: not ready for longer than that, while another one is.

    Where no other is, waiting costs less than computing everything again, and whoever runs the routers replaces one
    that is stuck for good, which ends its streams.
    """
    healthy = {i for i, load in enumerate(loads) if load.lost_at_s is None and load.unready_since_s is None}
    return [
        index
        for index, load in enumerate(loads)
        if load.num_requests
        and load.unready_since_s is not None
        and now_s - load.unready_since_s > patience_s
        and healthy
    ]
