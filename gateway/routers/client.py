"""What the gateway needs from its routers: as one, which `gateway.routers.pool` makes of several, and from each, which
`gateway.routers.serve_router_client` implements over Ray Serve and tests with a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from router.request import GenerationRequest, TokenEvent


@dataclass(frozen=True)
class RouterHealth:
    """Whether the router would serve a request now, and why not."""

    is_ready: bool
    detail: str


class RouterClient(Protocol):
    """A router, or several that stand in for each other, seen from the gateway's event loop."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Events of one request until one with a finish reason; an async generator.

        `request.request_id` is unique among all open requests. Closing the generator early (`aclose`, or
        cancelling the task that awaits it) cancels the request in the router. The first iteration raises
        RouterBusy or RouterUnavailable when the request is not taken; any raises RouterLost when the router that
        had taken it is lost.
        """
        ...

    async def feedback(self, answer_id: str, score: float) -> bool:
        """Score an answer, from -1 to 1. False where it is not known (any more). Raises RouterUnavailable."""
        ...

    async def health(self) -> RouterHealth: ...

    async def metrics(self) -> str:
        """Prometheus text of the router and its expert actors. Raises RouterUnavailable."""
        ...

    async def status(self) -> dict[str, object]:
        """Plain JSON values. Raises RouterUnavailable."""
        ...


class RouterLink(RouterClient, Protocol):
    """One router of several."""

    def abandon(self) -> None:
        """Take it for lost: open generators raise RouterLost, though nothing has told so."""
        ...
