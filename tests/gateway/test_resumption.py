"""What a request is asked for again with, and what of its events is its own."""

from __future__ import annotations

from gateway.http.quality import describe_quality
from gateway.routers.resumption import MAX_FRUITLESS, ResumableRequest
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import ExplainedLayer, RoutingChoice, RoutingReport

REQUEST = GenerationRequest(
    "a", (5, 6, 7), SamplingParams(max_tokens=9, seed=3), num_logprobs=1, num_prompt_logprobs=1, group="g"
)


def _explained(*positions: int) -> tuple[ExplainedLayer, ...]:
    return tuple(ExplainedLayer(position, 0, (), (0.0,) * 5) for position in positions)


def _report(choice: RoutingChoice, **more: object) -> RoutingReport:
    return RoutingReport(choice, 2, 8, 1, **more)  # type: ignore[arg-type]


def test_first_attempt_is_the_request_and_each_later_one_has_an_id_of_its_own() -> None:
    resumable = ResumableRequest(REQUEST)
    assert resumable.attempt() is REQUEST
    again = resumable.attempt()
    assert (again.request_id, again.answer_id, again.generated_ids) == ("a~2", "a", ())
    assert resumable.attempt().request_id == "a~3"


def test_attempt_after_a_loss_brings_what_was_received_and_changes_nothing_else() -> None:
    resumable = ResumableRequest(REQUEST)
    resumable.attempt()
    resumable.accept(TokenEvent("a", (1, 2)))
    resumable.accept(TokenEvent("a", (3,)))
    resumable.lose()
    again = resumable.attempt()
    assert again.generated_ids == (1, 2, 3)
    assert (again.prompt_ids, again.sampling, again.group) == (REQUEST.prompt_ids, REQUEST.sampling, "g")
    event = resumable.accept(TokenEvent("a~2", (4,), "length"))
    assert (event.request_id, event.token_ids, event.finish_reason) == ("a", (4,), "length")


def test_request_that_came_with_tokens_keeps_them() -> None:
    resumable = ResumableRequest(GenerationRequest("a", (5,), generated_ids=(9, 8)))
    resumable.attempt()
    resumable.accept(TokenEvent("a", (7,)))
    assert resumable.attempt().generated_ids == (9, 8, 7)
    assert resumable.num_tokens == 4


def test_efforts_travel_with_their_tokens() -> None:
    choice = RoutingChoice("native", "auto")
    resumable = ResumableRequest(REQUEST)
    resumable.attempt()
    resumable.accept(TokenEvent("a", (1, 2), routing=_report(choice, efforts=("focus", "wake"))))
    assert resumable.attempt().generated_efforts == ("focus", "wake")


def test_what_was_explained_is_not_explained_again() -> None:
    choice = RoutingChoice("native", is_explained=True)
    resumable = ResumableRequest(REQUEST)
    resumable.attempt()
    resumable.accept(TokenEvent("a", (1,), routing=_report(choice, explained=_explained(0, 1, 2))))
    resumable.accept(TokenEvent("a", (2,), routing=_report(choice, explained=_explained(3))))
    resumable.lose()
    event = resumable.accept(
        TokenEvent("a~2", (3,), routing=_report(choice, explained=_explained(0, 1, 2, 3, 4)))
    )
    assert event.routing is not None
    assert event.routing.explained == _explained(4)


def test_only_routing_that_follows_its_service_is_said_to_have_been_chosen_anew() -> None:
    shown = {}
    for choice in (RoutingChoice("native", "wake"), RoutingChoice("snarc")):
        resumable = ResumableRequest(REQUEST)
        resumable.lose()  # nothing was received: nothing is chosen anew
        resumable.accept(TokenEvent("a", (1,), routing=_report(choice, tokens_at=(0, 3, 0))))
        resumable.lose()
        event = resumable.accept(TokenEvent("a", (2,), routing=_report(choice, tokens_at=(0, 4, 0))))
        assert event.routing is not None
        shown[choice.policy] = describe_quality([event.routing])
    assert shown["snarc"]["resumed"] == 1
    assert "resumed" not in shown["native"]


def test_request_that_ends_every_router_before_its_next_token_is_given_up() -> None:
    resumable = ResumableRequest(REQUEST)
    for _ in range(3):
        for _ in range(MAX_FRUITLESS):
            resumable.lose()
        assert not resumable.is_hopeless
        resumable.accept(TokenEvent("a", (1,)))
    for _ in range(MAX_FRUITLESS + 1):
        resumable.lose()
    assert resumable.is_hopeless
