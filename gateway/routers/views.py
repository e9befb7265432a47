"""What several routers say of themselves, as one answer. Pure. Called by `gateway.routers.pool`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import RouterUnavailable
from gateway.routers.client import RouterHealth


@dataclass(frozen=True)
class RouterView:
    """One router, seen from the gateway."""

    name: str
    num_open: int
    """Requests of this gateway that it has."""
    status: Mapping[str, Any] | None
    """What it answers; None where it does not."""


def join_health(names: Sequence[str], answers: Sequence[RouterHealth]) -> RouterHealth:
    """Ready when one of them is; of several, all are told."""
    if len(answers) == 1:
        return answers[0]
    details = (f"{name}: {health.detail}" for name, health in zip(names, answers, strict=True))
    return RouterHealth(any(health.is_ready for health in answers), "; ".join(details))


def join_status(views: Sequence[RouterView]) -> dict[str, object]:
    """The first answer, with what all routers have in common: actors, nodes, memory.

    `routers` lists every router; `router` is the first that answers; `requests` are those of all; `capacity` is that
    of the router that stands for the most bytes, as for the expert actors. Raises RouterUnavailable.
    """
    answers = [view.status for view in views if view.status is not None]
    if not answers:
        raise RouterUnavailable("no router answers")
    counts = [answer["requests"] for answer in answers]
    return {
        **answers[0],
        "routers": [_router(view) for view in views],
        "requests": {key: sum(count[key] for count in counts) for key in counts[0]},
        "capacity": max(
            (answer["capacity"] for answer in answers), key=lambda capacity: int(capacity["resident_bytes"])
        ),
    }


def _router(view: RouterView) -> dict[str, object]:
    known: dict[str, object] = {"name": view.name, "open_requests": view.num_open}
    if view.status is None:
        return known | {"state": "lost"}
    own = {key: view.status[key] for key in ("requests", "capacity")}
    return {**known, "state": "ready", **view.status["router"], **own}
