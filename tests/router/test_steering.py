"""Requests with a choice of routing, alone and beside native ones, through a whole engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from router import explanation, steering_plan
from router.attention import BLOCK_POSITIONS
from router.batcher import BatchLimits
from router.dispatch import Dispatch
from router.effort import EFFORTS
from router.engine import Engine
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import NATIVE_CHOICE, RoutingChoice, RoutingReport
from router.scoring import PRESETS, Routing, SnarcWeights
from router.steering import SteeredPolicy
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner
from tests.engines import Outcome, assert_same_bits, open_engine, pause_prompts, run_to_end, small_engine

PROMPT = tuple(range(1, 30))
CHOICES = (
    NATIVE_CHOICE,
    RoutingChoice("snarc"),
    RoutingChoice("native", "wake"),
    RoutingChoice("snarc", "crisis", is_explained=True),
    RoutingChoice("snarc", "auto"),
    RoutingChoice(is_explained=True),
)


def request(
    name: str, choice: RoutingChoice = NATIVE_CHOICE, *, max_tokens: int = 8, shift: int = 0
) -> GenerationRequest:
    prompt = tuple(token + shift for token in PROMPT)
    return GenerationRequest(
        name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), routing=choice
    )


@pytest.fixture
def loaded(tiny_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(tiny_store, EngineOptions(snarc=PRESETS["scaled"]))
    yield loaded
    loaded.close()


def finish(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, TokenEvent]:
    """All events of every request in one."""
    for each in requests:
        engine.submit(each)
    merged: dict[str, TokenEvent] = {}
    while engine.has_work:
        for event in engine.step():
            earlier = merged.get(event.request_id)
            merged[event.request_id] = event if earlier is None else earlier.followed_by(event)
    return merged


def report_of(event: TokenEvent) -> RoutingReport:
    assert event.routing is not None
    return event.routing


def policy_of(loaded: LoadedEngine) -> SteeredPolicy:
    assert isinstance(loaded.engine.policy, SteeredPolicy)
    return loaded.engine.policy


class _Notes(RoutingWatcher):
    """What every request's rows were routed to."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], tuple[list[int], list[float]]] = {}

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        row = 0
        for owner in owners:
            for position in range(owner.first, owner.first + owner.count):
                key = owner.request.request_id, gate.layer, position
                self.rows[key] = routing.experts_TK[row].tolist(), routing.weights_TK[row].tolist()
                row += 1


def noted(loaded: LoadedEngine, requests: Sequence[GenerationRequest]) -> _Notes:
    notes = _Notes()
    loaded.engine.watchers = (notes,)
    run_to_end(loaded.engine, requests)
    loaded.engine.watchers = ()
    return notes


@pytest.mark.parametrize("limits", [None, BatchLimits(max_batch_tokens=7, max_running=7)])
def test_native_requests_keep_their_bits_beside_every_other_choice(
    loaded: LoadedEngine, limits: BatchLimits | None
) -> None:
    natives = [request(f"native-{i}", shift=i) for i in range(3)]
    reference = run_to_end(loaded.engine, natives)
    loaded.engine.limits = limits or loaded.engine.limits
    others = [request(f"other-{i}", choice, shift=5 + i) for i, choice in enumerate(CHOICES)]
    mixed = [each for pair in zip(others, [*natives, *natives], strict=True) for each in pair]
    mixed = list(dict.fromkeys(mixed))
    outcome = run_to_end(loaded.engine, mixed, join_at=[0, 0, 1, 2, 3, 3, 4])
    for name in (each.request_id for each in natives):
        assert outcome.tokens[name] == reference.tokens[name]
        assert torch.equal(torch.stack(outcome.logits[name]), torch.stack(reference.logits[name]))


def test_plain_requests_leave_nothing_behind_and_no_report(loaded: LoadedEngine) -> None:
    ends = finish(loaded.engine, [request("a"), request("b")])
    assert [event.routing for event in ends.values()] == [None, None]
    assert policy_of(loaded).num_open == 0


@pytest.mark.parametrize("policy", ["native", "snarc"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_sets_the_number_of_experts_of_every_token(
    loaded: LoadedEngine, policy: str, effort: str
) -> None:
    choice = RoutingChoice(policy, effort)  # type: ignore[arg-type]
    notes = noted(loaded, [request("a", choice)])
    config = loaded.config
    k = {"wake": config.experts_per_token // 2, "focus": config.experts_per_token}.get(
        effort, min(config.num_experts, 2 * config.experts_per_token)
    )
    assert {len(experts) for experts, _ in notes.rows.values()} == {k}
    for experts, weights in notes.rows.values():
        assert len(set(experts)) == k and min(experts) >= 0
        assert not config.normalise_top_k or sum(weights) == pytest.approx(1.0, abs=1e-5)


def test_effort_alone_equals_the_same_effort_beside_others(loaded: LoadedEngine) -> None:
    """Without terms that depend on the service's state, every choice is as exact as native routing."""
    efforts = [RoutingChoice("native", effort) for effort in ("wake", "crisis", "auto")]
    requests = [request(choice.effort, choice, max_tokens=20, shift=i) for i, choice in enumerate(efforts)]
    together = run_to_end(loaded.engine, [*requests, request("native")])
    loaded.engine.limits = BatchLimits(max_batch_tokens=5, max_running=5)
    for each in requests:
        alone = run_to_end(loaded.engine, [each])
        assert alone.tokens[each.request_id] == together.tokens[each.request_id]
        rows = torch.stack(together.logits[each.request_id])
        assert torch.equal(torch.stack(alone.logits[each.request_id]), rows)


def test_snarc_without_the_service_s_state_is_a_function_of_the_request(tiny_store: Path) -> None:
    """Surprise and reward steer (here with equal novelty and trust for all, they cannot change a ranking, so the
    weights of the gate do it all): chunks and neighbours change no bit."""
    weights = SnarcWeights(router=0.5, novelty=0.0, trust=0.2, warmth=0.0)
    loaded = open_engine(tiny_store, EngineOptions(snarc=weights))
    choice = RoutingChoice("snarc", "auto")
    requests = [request(f"r{i}", choice, max_tokens=24, shift=3 * i) for i in range(3)]
    together = run_to_end(loaded.engine, requests)
    loaded.engine.limits = BatchLimits(max_batch_tokens=3, max_running=3)
    apart = run_to_end(loaded.engine, requests, join_at=[0, 4, 9])
    assert_same_bits(apart, together)
    loaded.close()


def test_preempted_request_follows_the_same_efforts_again(loaded: LoadedEngine) -> None:
    """With few KV blocks and no swap memory, sequences are computed again, prompt and answer in one go."""
    choice = RoutingChoice("native", "auto")
    requests = [request(f"r{i}", choice, max_tokens=120, shift=3 * i) for i in range(3)]
    roomy = run_to_end(loaded.engine, requests)
    narrow = small_engine(loaded, num_blocks=5, limits=BatchLimits(admission_reserve=8))
    narrow.policy = narrow.reporter = policy_of(loaded)
    outcome = run_to_end(narrow, requests)
    assert narrow.stats.preemptions > 0
    assert_same_bits(outcome, roomy)


def test_prompts_of_every_choice_pause_beside_streams_and_keep_bits_counts_and_explanations(
    tiny_store: Path,
) -> None:
    """With weights that look at nothing but the request itself."""
    loaded = open_engine(tiny_store, EngineOptions(snarc=SnarcWeights(novelty=0.0, trust=0.2, warmth=0.0)))
    streams = [request("stream", max_tokens=160), request("steered", CHOICES[3], max_tokens=130)]
    choices = {
        "wake": RoutingChoice("native", "wake"),
        "crisis": RoutingChoice("native", "crisis"),
        "auto": RoutingChoice("native", "auto"),
        "snarc": RoutingChoice("snarc", is_explained=True),
    }
    prompts = [request(name, choice, shift=7) for name, choice in choices.items()]
    expected = finish(loaded.engine, prompts)
    alone = {each.request_id: run_to_end(loaded.engine, [each]) for each in prompts}
    engine = loaded.engine
    pause_prompts(engine)
    for each in streams:
        engine.submit(each)
    for _ in range(2):
        engine.step()
    was_paused = set[str]()
    for each in prompts:
        engine.submit(each)
    engine.outcome = Outcome()  # type: ignore[attr-defined]
    merged: dict[str, TokenEvent] = {}
    while engine.has_work:
        for event in engine.step():
            earlier = merged.get(event.request_id)
            merged[event.request_id] = event if earlier is None else earlier.followed_by(event)
        was_paused |= {rows.sequence.name for step in engine._passes for rows in step.rows}
    assert was_paused == set(choices)
    outcome: Outcome = engine.outcome  # type: ignore[attr-defined]
    for name, whole in alone.items():
        assert outcome.tokens[name] == whole.tokens[name]
        assert all(map(torch.equal, outcome.logits[name], whole.logits[name]))
        found, known = report_of(merged[name]), report_of(expected[name])
        assert found.tokens_at == known.tokens_at
        assert sorted(found.explained) == sorted(known.explained)
    assert policy_of(loaded).num_open == 0 and not policy_of(loaded)._under_way
    loaded.close()


def test_prompt_that_is_preempted_in_a_pass_that_pauses_is_explained_as_a_whole(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions(snarc=SnarcWeights(novelty=0.0, trust=0.2, warmth=0.0)))

    def asked(name: str, num_prompt: int, max_tokens: int, choice: RoutingChoice) -> GenerationRequest:
        prompt = tuple((7 * number) % 90 + 3 for number in range(num_prompt))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return GenerationRequest(name, prompt, sampling, routing=choice)

    prompt = asked("prompt", BLOCK_POSITIONS + 40, 5, RoutingChoice("snarc", is_explained=True))
    known = report_of(finish(loaded.engine, [prompt])["prompt"])
    engine = small_engine(loaded, 3, BatchLimits(admission_reserve=1), num_swap_blocks=2)
    engine.policy = engine.reporter = policy_of(loaded)
    pause_prompts(engine)
    engine.submit(asked("stream", BLOCK_POSITIONS - 2, 60, NATIVE_CHOICE))
    engine.step()
    found = report_of(finish(engine, [prompt])["prompt"])
    assert engine.stats.preemptions > 0
    assert sorted(found.explained) == sorted(known.explained)
    assert not policy_of(loaded)._under_way
    loaded.close()


def test_report_tells_tokens_misses_and_the_choice(loaded: LoadedEngine) -> None:
    choice = RoutingChoice("native", "wake")
    report = report_of(finish(loaded.engine, [request("a", choice)])["a"])
    assert report.choice == choice
    assert report.tokens_at == (len(PROMPT) + 7, 0, 0)
    assert 0 < report.misses <= sum(report.tokens_at) * report.num_layers * loaded.config.experts_per_token
    # Everything fits, so by now each expert that is asked for again is resident.
    assert report_of(finish(loaded.engine, [request("b", choice)])["b"]).misses == 0
    assert policy_of(loaded).num_open == 0


def test_cancelled_request_is_forgotten(loaded: LoadedEngine) -> None:
    loaded.engine.submit(request("a", RoutingChoice("snarc")))
    loaded.engine.step()
    assert policy_of(loaded).num_open == 1
    loaded.engine.cancel("a")
    assert policy_of(loaded).num_open == 0


def test_explanation_covers_every_token_and_layer_and_adds_up(loaded: LoadedEngine) -> None:
    notes = _Notes()
    loaded.engine.watchers = (notes,)
    choice = RoutingChoice("snarc", is_explained=True)
    report = report_of(finish(loaded.engine, [request("a", choice)])["a"])
    layers = sorted(loaded.config.moe_layers)
    places = [(entry.position, entry.layer) for entry in report.explained]
    assert sorted(places) == [(p, layer) for p in range(len(PROMPT) + 7) for layer in layers]
    for entry in report.explained:
        experts, weights = notes.rows["a", entry.layer, entry.position]
        assert [chosen.expert for chosen in entry.experts] == experts
        assert [chosen.weight for chosen in entry.experts] == pytest.approx(weights, abs=1e-5)
        scores = [chosen.gate + chosen.salience + chosen.trust + chosen.warmth for chosen in entry.experts]
        assert scores == sorted(scores, reverse=True) or scores == pytest.approx(
            sorted(scores, reverse=True), abs=1e-5
        )
        assert {chosen.warmth for chosen in entry.experts} <= {0.0, PRESETS["scaled"].warmth}
        assert all(0.0 <= signal <= 1.0 for signal in entry.signals)
    assert not report.is_cut


def test_explained_native_request_has_the_native_bits_and_no_parts_but_the_gate(loaded: LoadedEngine) -> None:
    reference = run_to_end(loaded.engine, [request("a")])
    explained = run_to_end(loaded.engine, [request("a", RoutingChoice(is_explained=True))])
    assert_same_bits(explained, reference)
    end = finish(loaded.engine, [request("a", RoutingChoice(is_explained=True))])["a"]
    parts = {(e.salience, e.trust, e.warmth) for entry in report_of(end).explained for e in entry.experts}
    assert parts == {(0.0, 0.0, 0.0)}


def test_explanation_is_bounded_and_says_so(loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (explanation, steering_plan):
        monkeypatch.setattr(module, "MAX_EXPLAINED", 7)
    asked = [request("a", RoutingChoice(is_explained=True)), request("b", RoutingChoice("snarc"))]
    report = report_of(finish(loaded.engine, asked)["a"])
    assert len(report.explained) == 7 and report.is_cut


def test_feedback_replaces_the_confidence_gain(loaded: LoadedEngine) -> None:
    choice = RoutingChoice("snarc", is_explained=True)
    ends = finish(
        loaded.engine,
        [request("fed", replace(choice, reward=0.9)), request("unfed", choice, shift=1)],
    )
    rewards = {name: {e.signals[3] for e in report_of(end).explained} for name, end in ends.items()}
    assert rewards["fed"] == {0.9}
    assert len(rewards["unfed"]) > 1


def test_warmth_prefers_residents(tiny_store: Path) -> None:
    """Under a budget of half the experts, a heavy warmth chooses residents where native routing would not."""

    def misses(weights: SnarcWeights) -> int:
        loaded = open_engine(tiny_store, EngineOptions(snarc=weights))
        total = loaded.store.expert_keys(loaded.store.served.name)
        nbytes = sum(loaded.store.record(key).nbytes for key in total)
        loaded.close()
        loaded = open_engine(tiny_store, EngineOptions(snarc=weights, expert_budget_bytes=nbytes // 2))
        asked = [request(f"r{i}", RoutingChoice("snarc"), max_tokens=60, shift=3 * i) for i in range(2)]
        ends = finish(loaded.engine, asked)
        loaded.close()
        return sum(report_of(end).misses for end in ends.values())

    cold = misses(SnarcWeights(router=1.0, novelty=0.0, trust=0.0, warmth=0.0))
    warm = misses(SnarcWeights(router=1.0, novelty=0.0, trust=0.0, warmth=1.0))
    assert warm < 0.9 * cold


def test_requests_of_a_group_share_their_prompt_only_where_plain(loaded: LoadedEngine) -> None:
    def computed(choice: RoutingChoice) -> int:
        before = loaded.engine.stats.prompt_tokens
        finish(
            loaded.engine,
            [replace(request(f"{choice.policy}-{i}", choice), group="g", prompt_ids=tuple(range(1, 100)))
             for i in range(3)],
        )  # fmt: skip
        return loaded.engine.stats.prompt_tokens - before

    assert computed(NATIVE_CHOICE) == 99 + 2
    assert computed(RoutingChoice("snarc")) == 3 * 99


def test_engine_without_a_reporter_refuses_a_choice(loaded: LoadedEngine) -> None:
    bare = small_engine(loaded, num_blocks=4)
    with pytest.raises(ValueError, match="native routing only"):
        bare.submit(request("a", RoutingChoice("snarc")))
