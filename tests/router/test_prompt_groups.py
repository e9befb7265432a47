"""Who shares a prompt with whom, without an engine; and the edges of sharing in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from router.errors import PromptInvalid
from router.loading import EngineOptions
from router.prompt_groups import Member, match_members, shared_positions
from router.request import GenerationRequest, SamplingParams
from tests.engines import (
    Outcome,
    assert_nothing_held,
    assert_same_bits,
    open_engine,
    run_to_end,
    small_engine,
)


def _taker(name: str, group: str | None = "g") -> Member:
    return Member(name, group, can_take=True)


def test_followers_wait_for_the_first() -> None:
    waiting = [_taker("a"), _taker("b"), _taker("c", "h"), _taker("d", None)]
    assert match_members([], waiting) == ({}, frozenset({"b"}))
    assert match_members([Member("p", "g")], waiting[:2]) == ({}, frozenset({"a", "b"}))


def test_followers_take_from_who_can_give() -> None:
    running = [Member("busy", "g"), Member("ready", "g", can_give=True), Member("other", None)]
    waiting = [_taker("a"), Member("scored", "g"), _taker("b")]
    assert match_members(running, waiting) == ({"a": "ready", "b": "ready"}, frozenset())


def test_nobody_waits_for_one_behind_it() -> None:
    """Else two would wait for each other for ever."""
    assert match_members([], [Member("scored", "g"), _taker("a")]) == ({}, frozenset({"a"}))
    assert match_members([], [_taker("a"), Member("scored", "g")]) == ({}, frozenset())


@pytest.mark.parametrize(("num_prompt", "shared"), [(1, 0), (64, 0), (65, 64), (128, 64), (129, 128)])
def test_only_blocks_that_nobody_writes_are_shared(num_prompt: int, shared: int) -> None:
    assert shared_positions(num_prompt) == shared


@pytest.mark.parametrize("length", [1, 2, 63, 64, 66])
def test_choices_around_a_block_s_edge_equal_single_requests(tiny_store: Path, length: int) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    requests = [
        GenerationRequest(
            f"c{i}", tuple(range(length)), SamplingParams(max_tokens=3 + i, seed=1, choice=i), group="g"
        )
        for i in range(3)
    ]
    alone = Outcome()
    for request in requests:
        outcome = run_to_end(loaded.engine, [request])
        alone.tokens |= outcome.tokens
        alone.logits |= outcome.logits
        alone.logprobs |= outcome.logprobs
    engine = small_engine(loaded, 12)
    assert_same_bits(run_to_end(engine, requests), alone)
    assert engine.stats.prompt_tokens == length + 2
    loaded.close()


def test_parent_that_is_cancelled_leaves_its_children_whole(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    prompt = tuple(range(66))
    parent, child, late = (
        GenerationRequest(f"c{i}", prompt, SamplingParams(max_tokens=6, seed=1, choice=i), group="g")
        for i in range(3)
    )
    alone = run_to_end(loaded.engine, [child]).tokens | run_to_end(loaded.engine, [late]).tokens
    engine = small_engine(loaded, 12)
    engine.submit(parent)
    engine.submit(child)
    engine.step()
    engine.step()  # the child joins, with the parent's blocks
    assert engine.allocator.num_shared("c1") == 1
    engine.submit(late)
    engine.cancel("c0")
    while engine.has_work:
        engine.step()
    assert engine.outcome.tokens["c1"] == alone["c1"] and engine.outcome.tokens["c2"] == alone["c2"]
    assert_nothing_held(engine)
    loaded.close()


def test_another_prompt_in_a_group_is_refused(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    first = GenerationRequest("a", (1, 2), group="g")
    loaded.engine.submit(first)
    with pytest.raises(PromptInvalid, match="another prompt"):
        loaded.engine.submit(replace(first, request_id="b", prompt_ids=(1, 3)))
    loaded.close()
