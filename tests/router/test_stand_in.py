"""What may stand in for an expert, what that changes, and that it leaves everyone else's bits alone."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.call import ExpertCall
from router.dispatch import combine, dispatch
from router.errors import WeightsInvalid
from router.loading import EngineOptions
from router.means_keeper import StandInOptions
from router.output_means import FEW_TOKENS, LEARNED_OF, MIN_USES, OutputMeans
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import NATIVE_CHOICE, RoutingChoice, RoutingReport
from router.scoring import ABSENT, PRESETS, Routing, read_weights
from router.stand_in import replace_spared, spare
from router.step_routing import EVERYTHING, NOTHING, GateOutput, SpanOwner
from tests.engines import assert_same_bits, open_engine, run_to_end

NUM_EXPERTS, WIDTH = 6, 4


def routing_of(experts: list[list[int]], weights: list[list[float]]) -> Routing:
    return Routing(torch.tensor(experts), torch.tensor(weights))


def spared_of(
    routing: Routing, resident: Set[int] = frozenset(), known: Set[int] | None = None, threshold: float = 0.7
) -> list[list[bool]]:
    cold_E = torch.tensor([e not in resident for e in range(NUM_EXPERTS)])
    size_E = torch.tensor([1.0 if known is None or e in known else torch.inf for e in range(NUM_EXPERTS)])
    spared = spare(routing, cold_E[routing.experts_TK], size_E, threshold)
    shape = routing.experts_TK.shape
    return [[False] * shape[1]] * shape[0] if spared is None else spared.tolist()


def all_cold(routing: Routing) -> torch.Tensor:
    return torch.ones_like(routing.experts_TK).bool()


def test_only_light_absent_and_known_experts_are_spared() -> None:
    routing = routing_of([[0, 1, 2], [3, 4, 5]], [[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]])
    assert spared_of(routing) == [[False, False, True], [False, True, True]]
    assert spared_of(routing, resident={2, 4}) == [[False, False, False], [False, False, True]]
    assert spared_of(routing, known={0, 1, 3, 4}) == [[False, False, False], [False, True, False]]
    assert spared_of(routing, threshold=0.0) == [[False] * 3] * 2


def test_share_counts_whatever_the_weights_sum_to() -> None:
    halved = routing_of([[0, 1, 2]], [[0.25, 0.2, 0.05]])
    assert spared_of(halved) == [[False, False, True]]


def test_a_loud_expert_weighs_more_than_its_gate_says() -> None:
    routing = routing_of([[0, 1, 2]], [[0.5, 0.3, 0.2]])
    size_E = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 1.0])
    spared = spare(routing, all_cold(routing), size_E, 0.7)
    assert spared is not None and spared.tolist() == [[False, True, False]]


WEIGHTS = st.floats(2**-10, 1.0, width=32)  # as a routing has them: two that differ by less would be one


@given(st.lists(WEIGHTS, min_size=3, max_size=3), st.floats(0.0, 16.0))
def test_the_heaviest_expert_is_always_computed(weights: list[float], threshold: float) -> None:
    routing = routing_of([[4, 0, 2]], [weights])
    spared = spared_of(routing, threshold=threshold)[0]
    assert not spared[weights.index(max(weights))]


def test_means_take_the_place_of_what_is_spared_and_weights_of_the_others_stay() -> None:
    routing = routing_of([[0, 1, 2], [3, 4, 5]], [[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]])
    means_ED = torch.arange(NUM_EXPERTS).float().unsqueeze(1).expand(NUM_EXPERTS, WIDTH)
    spared = torch.tensor([[False] * 3, [False, True, True]])
    replaced = replace_spared(routing, spared, means_ED)
    assert replaced.experts_TK.tolist() == [[0, 1, 2], [3, ABSENT, ABSENT]]
    assert torch.equal(replaced.weights_TK[0], routing.weights_TK[0])
    assert replaced.weights_TK[1].tolist() == pytest.approx([0.9, 0.0, 0.0])
    assert replaced.stand_ins is not None
    assert replaced.stand_ins.rows_N.tolist() == [1]
    assert replaced.stand_ins.output_ND[0].tolist() == pytest.approx([0.05 * 4 + 0.05 * 5] * WIDTH)


def _outputs(call: ExpertCall) -> torch.Tensor:
    """Expert e answers e in every place, plus the token's own first number."""
    experts = torch.tensor(call.experts).repeat_interleave(torch.tensor(call.counts))
    return experts.float().unsqueeze(1) + call.tokens_TD[list(call.token_of_R), :1]


def _watched(
    means: OutputMeans, routing: Routing, tokens_TD: torch.Tensor, owners: Sequence[SpanOwner] = ()
) -> None:
    gate = GateOutput(0, tokens_TD, torch.zeros(len(tokens_TD), NUM_EXPERTS), 2, True)
    dispatched = dispatch("text", 0, tokens_TD, routing)
    rows = _outputs(dispatched.call).expand(-1, WIDTH)
    means.watch(owners, gate, routing, dispatched, rows)


@pytest.fixture
def means() -> OutputMeans:
    means = OutputMeans(NUM_EXPERTS, WIDTH, [0])
    means.is_learning = True
    return means


def test_means_need_enough_uses(means: OutputMeans) -> None:
    tokens_TD = torch.tensor([[0.0] * WIDTH, [4.0] * WIDTH]).repeat(MIN_USES, 1)
    light_then_heavy = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).repeat(MIN_USES, 1)
    routing = Routing(torch.tensor([[1, 2]]).repeat(2 * MIN_USES, 1), light_then_heavy)
    cold = all_cold(routing)
    assert spare(routing, cold, means.sizes(0), 0.7) is None, "nothing is known yet"
    _watched(means, routing, tokens_TD)
    spared = spare(routing, cold, means.sizes(0), 0.7)
    assert spared is not None and spared[0].tolist() == [False, True]
    replaced = replace_spared(routing, spared, means.means(0))
    assert replaced.stand_ins is not None
    # Expert 2 answered 2 as often as 6.
    assert replaced.stand_ins.output_ND[0].tolist() == pytest.approx([0.1 * 4.0] * WIDTH, rel=1e-3)


def test_rows_without_a_stand_in_keep_their_bits(means: OutputMeans) -> None:
    tokens_TD = torch.randn(70, WIDTH, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[1, 2]]).repeat(70, 1), torch.tensor([[0.9, 0.1]]).repeat(70, 1))
    _watched(means, routing, tokens_TD)
    spared = torch.zeros(70, 2, dtype=torch.bool)
    spared[3, 1] = True
    replaced = replace_spared(routing, spared, means.means(0))

    def output(chosen: Routing) -> torch.Tensor:
        dispatched = dispatch("text", 0, tokens_TD, chosen)
        total_TD = combine(dispatched, _outputs(dispatched.call).expand(-1, WIDTH))
        return total_TD if chosen.stand_ins is None else total_TD.clone().index_add_(0, *chosen.stand_ins)

    others = [row for row in range(70) if row != 3]
    whole, part = output(routing), output(replaced)
    assert torch.equal(whole[others], part[others])
    assert not torch.equal(whole[3], part[3])


def test_nothing_is_learned_before_somebody_could_use_it() -> None:
    means = OutputMeans(NUM_EXPERTS, WIDTH, [0])
    routing = Routing(torch.tensor([[1, 2]]).repeat(99, 1), torch.tensor([[0.9, 0.1]]).repeat(99, 1))
    _watched(means, routing, torch.ones(99, WIDTH))
    assert spare(routing, all_cold(routing), means.sizes(0), 0.7) is None


def test_decoding_shows_every_layer_in_its_turn_and_prompts_all() -> None:
    means = OutputMeans(NUM_EXPERTS, WIDTH, range(4))
    request = GenerationRequest("one", (1,), SamplingParams(max_tokens=1))
    few, many = ([SpanOwner(request, 0, count)] for count in (FEW_TOKENS - 1, FEW_TOKENS))
    assert means.wanted(many) is NOTHING, "nobody could use it yet"
    means.is_learning = True
    assert means.wanted(many) is EVERYTHING
    shown = [layer for _ in range(LEARNED_OF) for layer in means.wanted(few).layers or ()]
    assert sorted(shown) == [0, 1, 2, 3]


def test_decoding_teaches_only_what_was_asked_for() -> None:
    means = OutputMeans(NUM_EXPERTS, WIDTH, [0])
    means.is_learning = True
    request = GenerationRequest("one", (1,), SamplingParams(max_tokens=1))
    routing = Routing(torch.tensor([[1, 2]]), torch.tensor([[0.9, 0.1]]))
    paused, stream = ([SpanOwner(request, 0, count)] for count in (2, 1))
    while not means.wanted(paused).layers:
        pass
    for _ in range(LEARNED_OF):  # between the layers of the first
        means.wanted(stream)
        _watched(means, routing, torch.ones(1, WIDTH), stream)
    assert means.num_learned == 2
    for _ in range(2):
        _watched(means, routing, torch.ones(1, WIDTH), paused)
        assert means.num_learned == 4


@pytest.mark.parametrize("number", [torch.inf, torch.nan, 3e38], ids=["inf", "nan", "norm overflows"])
def test_one_answer_that_overflows_does_not_spoil_the_means(means: OutputMeans, number: float) -> None:
    routing = Routing(torch.tensor([[1, 2]]).repeat(99, 1), torch.tensor([[0.9, 0.1]]).repeat(99, 1))
    _watched(means, routing, torch.ones(99, WIDTH))
    before = means.copy(0).output_ED, means.sizes(0)
    _watched(means, routing, torch.cat([torch.ones(98, WIDTH), torch.full((1, WIDTH), number)]))
    after = means.copy(0).output_ED, means.sizes(0)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    _watched(means, routing, torch.ones(99, WIDTH))
    assert means.means(0).isfinite().all() and means.sizes(0)[1:3].isfinite().all()


@pytest.mark.parametrize("text", ["stand_in=-1", "stand_in=nan", "stand_in=17", "stand_in=x"])
def test_hostile_thresholds_are_refused(text: str) -> None:
    with pytest.raises(WeightsInvalid, match="stand_in must be a number"):
        read_weights(text)


def request(name: str, choice: RoutingChoice, prompt: tuple[int, ...]) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=24, temperature=0.0), routing=choice)


def test_a_service_with_stand_ins_reads_less_and_leaves_native_neighbours_alone(stories_store: Path) -> None:
    prompt = tuple(range(300, 340))
    quarter = 6 * 16 * 36864 * 2
    options = EngineOptions(expert_budget_bytes=quarter, snarc=PRESETS["thrifty"], stand_ins=StandInOptions())
    native = request("native", NATIVE_CHOICE, prompt)
    loaded = open_engine(stories_store, options)
    alone = run_to_end(loaded.engine, [native])
    reports: dict[str, RoutingReport] = {}
    whole = loaded.engine.step

    def step() -> list[TokenEvent]:
        events = whole()
        reports.update({event.request_id: event.routing for event in events if event.routing is not None})
        return events

    thrifty = [request(f"thrifty-{i}", RoutingChoice("snarc"), prompt * 12) for i in range(2)]
    run_to_end(loaded.engine, thrifty)  # learns
    loaded.engine.step = step  # type: ignore[method-assign]
    together = run_to_end(loaded.engine, [native, thrifty[0]])
    loaded.close()
    del together.tokens["thrifty-0"], together.logits["thrifty-0"]
    assert_same_bits(together, alone)
    report = reports["thrifty-0"]
    assert report.stand_ins > 0
    assert 0 < report.misses < report.stand_ins + report.misses
