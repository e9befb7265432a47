"""What one request has computed and another finds: the same bits as computing anew, and nobody else's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from router.attention import BLOCK_POSITIONS
from router.batcher import BatchLimits
from router.loading import EngineOptions, LoadedEngine
from router.prefix_keys import PrefixScope
from router.prompt_inputs import NO_INPUTS, InputRows, PromptInputs
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import RoutingChoice
from tests.engines import (
    Outcome,
    RecordingEngine,
    assert_nothing_held,
    assert_same_bits,
    open_engine,
    pause_prompts,
    run_to_end,
    small_engine,
)

TEXT = tuple(random.Random(1).choices(range(3, 483), k=400))
SCOPE = PrefixScope("store", "class", 2)


@pytest.fixture(scope="module")
def loaded(tiny_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32", prefix_cache=False))
    yield loaded
    loaded.close()


def _engine(
    loaded: LoadedEngine, num_blocks: int = 16, limits: BatchLimits | None = None, num_swap_blocks: int = 0
) -> RecordingEngine:
    engine = small_engine(loaded, num_blocks, limits, num_swap_blocks=num_swap_blocks)
    engine.kv.scope = SCOPE
    engine.policy, engine.reporter = loaded.engine.policy, loaded.engine.reporter
    return engine


def _request(name: str, prompt: tuple[int, ...], max_tokens: int = 6, **more: Any) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=len(prompt))
    return GenerationRequest(name, prompt, sampling, num_logprobs=1, **more)


def _finish(engine: RecordingEngine) -> list[TokenEvent]:
    """Events of all steps. What ends leaves nothing behind that is held."""
    events = []
    while engine.has_work:
        events += engine.step()
        engine.allocator.check()
    assert_nothing_held(engine)
    return events


def _found(
    engine: RecordingEngine, request: GenerationRequest, inputs: PromptInputs = NO_INPUTS
) -> tuple[int, Outcome]:
    """How many of its tokens it found computed, and what came of it."""
    engine.outcome = Outcome()
    before = engine.kv.num_hit_positions, engine.stats.prompt_tokens
    engine.submit(request, inputs)
    events = _finish(engine)
    found = engine.kv.num_hit_positions - before[0]
    assert engine.stats.prompt_tokens - before[1] == len(request.prompt_ids) - found
    assert [event.num_cached for event in events] == [found] + [0] * (len(events) - 1)
    return found, engine.outcome


def _alone(loaded: LoadedEngine, *requests: GenerationRequest) -> Outcome:
    whole = Outcome()
    for request in requests:
        outcome = run_to_end(small_engine(loaded, 16), [request])
        for part in ("tokens", "logits", "logprobs", "prompt_logprobs"):
            getattr(whole, part).update(getattr(outcome, part))
    return whole


@pytest.mark.parametrize(
    ("common", "found"), [(0, 0), (63, 0), (64, 64), (65, 64), (127, 64), (128, 128), (190, 128)]
)
def test_whole_blocks_of_a_common_beginning_are_found_and_change_no_bit(
    loaded: LoadedEngine, common: int, found: int
) -> None:
    engine = _engine(loaded)
    assert _found(engine, _request("first", TEXT[:190]))[0] == 0
    second = _request("second", (*TEXT[:common], *TEXT[300:330]))
    num_found, outcome = _found(engine, second)
    assert num_found == found
    assert_same_bits(outcome, _alone(loaded, second))


@pytest.mark.parametrize("length", [64, 65, 128])
def test_last_token_of_the_same_prompt_is_computed_for_its_logits(loaded: LoadedEngine, length: int) -> None:
    engine = _engine(loaded)
    request = _request("r", TEXT[:length])
    _found(engine, request)
    found, outcome = _found(engine, request)
    assert found == (length - 1) // BLOCK_POSITIONS * BLOCK_POSITIONS
    assert_same_bits(outcome, _alone(loaded, request))


def test_answer_is_found_by_the_conversation_s_next_turn(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    _, outcome = _found(engine, _request("turn", TEXT[:40], max_tokens=50))
    next_turn = _request("next", (*TEXT[:40], *outcome.tokens["turn"], *TEXT[200:220]))
    found, outcome = _found(engine, next_turn)
    assert found == 64, "of the 89 positions that the first turn computed"
    assert_same_bits(outcome, _alone(loaded, next_turn))


def test_prompt_is_found_while_its_first_request_still_runs(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    first, second = _request("first", TEXT[:130], 30), _request("second", TEXT[:150])
    engine.submit(first)
    engine.step()
    used = engine.allocator.num_used
    engine.submit(second)
    engine.step()
    assert engine.kv.num_hit_positions == 128
    assert engine.allocator.num_used == used + 1, "the two blocks have two holders"
    _finish(engine)
    assert_same_bits(engine.outcome, _alone(loaded, first, second))


def test_prompt_whose_logprobs_are_wanted_is_computed_whole(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    _found(engine, _request("first", TEXT[:140]))
    echo = _request("echo", TEXT[:140], num_prompt_logprobs=1)
    found, outcome = _found(engine, echo)
    assert found == 0
    assert_same_bits(outcome, _alone(loaded, echo))
    sent = tuple(outcome.tokens["echo"][:3])
    assert _found(engine, replace(echo, generated_ids=sent))[0] == 128, "resumed, it has had them"


@pytest.mark.parametrize(
    "routing",
    [
        RoutingChoice(policy="snarc"),
        RoutingChoice(effort="wake"),
        RoutingChoice(effort="auto"),
        RoutingChoice(is_explained=True),
    ],
)
def test_other_routing_neither_gives_nor_finds(loaded: LoadedEngine, routing: RoutingChoice) -> None:
    engine = _engine(loaded)
    other, plain = _request("other", TEXT[:140], routing=routing), _request("plain", TEXT[:140])
    assert _found(engine, other)[0] == 0
    assert engine.allocator.prefixes.num_known == 0
    _found(engine, plain)
    assert _found(engine, other)[0] == 0
    found, outcome = _found(engine, plain)
    assert found == 128
    assert_same_bits(outcome, _alone(loaded, plain))


def test_prompt_that_is_more_than_its_tokens_neither_gives_nor_finds(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    inputs = PromptInputs((InputRows(3, torch.ones(1, loaded.config.hidden_size)),))
    assert _found(engine, _request("r", TEXT[:140]), inputs)[0] == 0
    assert engine.allocator.prefixes.num_known == 0
    _found(engine, _request("r", TEXT[:140]))
    assert _found(engine, _request("r", TEXT[:140]), inputs)[0] == 0


def test_nobody_finds_another_owner_s(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    _found(engine, _request("r", TEXT[:140], owner="a"))
    assert _found(engine, _request("r", TEXT[:140], owner="b"))[0] == 0
    assert _found(engine, _request("r", TEXT[:140]))[0] == 0
    assert _found(engine, _request("r", TEXT[:140], owner="a"))[0] == 128


def test_request_that_failed_or_drew_nothing_gives_nothing(loaded: LoadedEngine) -> None:
    engine = _engine(loaded, limits=BatchLimits(max_batch_tokens=70))
    engine.submit(_request("cancelled", TEXT[:140]))
    engine.step()
    engine.cancel("cancelled")
    assert engine.allocator.prefixes.num_known == 0
    assert not engine.pool.keys.any(), "its numbers were never seen to be finite"
    engine.submit(_request("scored", TEXT[:140], 0, num_prompt_logprobs=0))
    _finish(engine)
    assert engine.allocator.prefixes.num_known == 0


def test_mixed_request_gives_nothing(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    engine.submit(_request("r", TEXT[:140]))
    engine._waiting["r"].is_mixed = True
    _finish(engine)
    assert engine.allocator.prefixes.num_known == 0


def test_actor_that_gave_wrong_rows_empties_the_cache(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(loaded)
    _found(engine, _request("before", TEXT[:140]))
    engine.submit(_request("running", TEXT[200:280], 5))
    engine.step()
    assert engine.allocator.prefixes.num_known > 0
    monkeypatch.setattr(type(loaded.directory), "num_quarantined", 1)
    _finish(engine)
    assert engine.allocator.prefixes.num_known == 0, "nor does what ran then give anything"
    assert _found(engine, _request("r", TEXT[:140]))[0] == 0
    assert _found(engine, _request("r", TEXT[:140]))[0] == 128


def test_full_cache_takes_no_room_from_requests(loaded: LoadedEngine) -> None:
    engine = _engine(loaded, 4, BatchLimits(admission_reserve=0))
    _found(engine, _request("old", TEXT[:130]))
    _found(engine, _request("new", TEXT[200:265]))
    assert engine.kv.prefix_bytes == 3 * engine.kv.block_bytes and engine.allocator.num_used == 0
    assert engine.allocator.num_free == 4
    big = _request("big", TEXT[100:300], 20)
    found, outcome = _found(engine, big)
    assert found == 0 and engine.allocator.prefixes.num_evicted == 3
    assert_same_bits(outcome, _alone(loaded, big))
    assert engine.kv.prefix_status() == {
        "bytes": 3 * engine.kv.block_bytes,
        "hit_tokens": 0,
        "evicted_blocks": 3,
    }


def test_what_two_requests_find_is_not_taken_from_one_for_the_other(loaded: LoadedEngine) -> None:
    """Both are admitted in one step, and the first needs room: nothing that the second was promised may go."""
    engine = _engine(loaded, 5, BatchLimits(admission_reserve=0))
    _found(engine, _request("given", TEXT[:130], 1))
    first, second = _request("first", TEXT[200:320], 4), _request("second", TEXT[:150], 4)
    engine.outcome = Outcome()
    engine.submit(first)
    engine.submit(second)
    engine.step()
    assert engine.num_running == 2 and engine.kv.num_hit_positions == 128
    _finish(engine)
    assert_same_bits(engine.outcome, _alone(loaded, first, second))


@pytest.mark.parametrize("num_swap_blocks", [0, 3])
def test_preempted_request_finds_what_it_had_or_has_it_back(
    loaded: LoadedEngine, num_swap_blocks: int
) -> None:
    engine = _engine(loaded, 4, BatchLimits(admission_reserve=1), num_swap_blocks)
    requests = [_request("old", TEXT[:62], 100), _request("young", TEXT[100:225], 60)]
    for request in requests:
        engine.submit(request)
    _finish(engine)
    assert engine.stats.preemptions > 0
    assert_same_bits(engine.outcome, _alone(loaded, *requests))


def test_choices_of_one_prompt_find_it_and_share_it(loaded: LoadedEngine) -> None:
    engine = _engine(loaded)
    _found(engine, _request("before", TEXT[:140]))
    choices = [
        GenerationRequest(f"c{i}", TEXT[:140], SamplingParams(max_tokens=4 + i, seed=1, choice=i), group="g")
        for i in range(3)
    ]
    engine.outcome = Outcome()
    for choice in choices:
        engine.submit(choice)
    before = engine.stats.prompt_tokens
    _finish(engine)
    assert engine.kv.num_hit_positions == 128
    assert engine.stats.prompt_tokens - before == 12 + 2, "the first's rest, and each other's last token"
    assert_same_bits(engine.outcome, _alone(loaded, *(replace(choice, group=None) for choice in choices)))


@pytest.mark.parametrize("seed", range(4))
def test_random_conversations_with_little_room_keep_their_bits(loaded: LoadedEngine, seed: int) -> None:
    chance = random.Random(seed)
    requests = []
    for number in range(24):
        begin, length = chance.choice((0, 150)), chance.choice((20, 64, 70, 128, 140, 190))
        tail = tuple(chance.randrange(3, 500) for _ in range(chance.choice((0, 1, 9))))
        prompt = (*TEXT[begin : begin + length], *tail)
        scored = {"num_prompt_logprobs": 0} if number % 7 == 3 else {}
        requests.append(_request(f"r{number}", prompt, chance.choice((1, 3, 30)), **scored))
    limits = BatchLimits(max_batch_tokens=96, max_running=5, admission_reserve=chance.choice((0, 8)))
    engine = _engine(loaded, 9, limits, chance.choice((0, 4)))
    if seed % 2:
        pause_prompts(engine, overtaking=(0, 70)[seed // 2])
    cancelled = set()
    for request in requests:
        engine.submit(request)
        for _ in range(chance.randint(0, 6)):
            engine.step()
            engine.allocator.check()
        victim = chance.choice(requests).request_id
        if chance.random() < 0.15 and engine.cancel(victim):
            cancelled.add(victim)
    _finish(engine)
    kept = [request for request in requests if request.request_id not in cancelled]
    for name in cancelled:
        for part in (engine.outcome.tokens, engine.outcome.logits, engine.outcome.logprobs):
            part.pop(name, None)
        engine.outcome.prompt_logprobs.pop(name, None)
    assert engine.kv.num_hit_positions > 0
    assert_same_bits(engine.outcome, _alone(loaded, *kept))
