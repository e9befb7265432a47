"""One request that outlives its router: what was received of it, and how it is asked for again. Pure.

A router that is given the tokens sent so far and the same seed goes on with the tokens that the lost one would have
drawn: native routing is a function of the request, and sampling noise one of (seed, choice, position). That holds for
every effort too, `auto` included, whose choices travel with the tokens. The snarc policy follows the state of its
service; its answers say how often they went on elsewhere (`sage.resumed`). Driven by `gateway.routers.pool`.
"""

from __future__ import annotations

from dataclasses import replace

from router.effort import Effort
from router.request import GenerationRequest, TokenEvent
from router.routing_choice import RoutingReport

MAX_FRUITLESS = 3
"""So many routers in a row may be lost with a request before it gets another token. One more, and it is taken for
the cause: it would go on to end every router that it is given to."""


class ResumableRequest:
    """A request, and what came of it."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._token_ids: list[int] = []
        self._efforts: list[Effort] = []
        self._num_attempts = 0
        self._num_fruitless = 0
        self._num_resumed = 0
        self._num_explained = 0
        """Positions whose explanations the client has had."""
        self.is_begun = False
        """Whether a router had taken it."""
        self.has_moved = False
        """Whether it was lost and has had no event since."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer so far."""
        request = self.request
        return len(request.prompt_ids) + len(request.generated_ids) + len(self._token_ids)

    @property
    def is_hopeless(self) -> bool:
        """Whether another router would be wasted on it."""
        return self._num_fruitless > MAX_FRUITLESS

    def attempt(self) -> GenerationRequest:
        """What to ask a router for now. Every attempt has an id of its own: events of one that was given up for lost
        and lives are nobody's."""
        self._num_attempts += 1
        request = self.request
        if self._num_attempts == 1:
            return request
        return replace(
            request,
            request_id=f"{request.request_id}~{self._num_attempts}",
            generated_ids=(*request.generated_ids, *self._token_ids),
            generated_efforts=(*request.generated_efforts, *self._efforts),
            answer_id=request.answer_id or request.request_id,
        )

    def accept(self, event: TokenEvent) -> TokenEvent:
        """The event of an attempt as the request's own."""
        self.is_begun, self.has_moved = True, False
        if event.token_ids:
            self._num_fruitless = 0
        self._token_ids += event.token_ids
        routing = None if event.routing is None else self._own_report(event.routing)
        return event._replace(request_id=self.request.request_id, routing=routing)

    def lose(self) -> None:
        """The router that had taken it is lost."""
        self.is_begun = self.has_moved = True
        self._num_fruitless += 1
        if self._token_ids:
            self._num_resumed += 1
            self._num_explained = self.num_tokens - 1  # the newest token was not computed yet

    def _own_report(self, report: RoutingReport) -> RoutingReport:
        """Without what the client has had, since tokens that are computed again are explained again."""
        self._efforts += report.efforts
        explained = tuple(entry for entry in report.explained if entry.position >= self._num_explained)
        is_chosen_anew = report.choice.policy != "native"
        return replace(report, explained=explained, num_resumed=self._num_resumed if is_chosen_anew else 0)
