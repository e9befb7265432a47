"""The batcher's decisions, without an engine."""

from __future__ import annotations

import random
from dataclasses import replace

from router.attention import BLOCK_POSITIONS
from router.batcher import BatchLimits, Chunk, SequenceFacts, plan_step
from router.kv_cache import blocks_for

LIMITS = BatchLimits(max_batch_tokens=32, max_running=4, admission_reserve=16)


def _decoding(name: str, length: int = 10, num_blocks: int = 1) -> SequenceFacts:
    return SequenceFacts(name, length, length - 1, num_blocks, 1000)


def _prompt(name: str, length: int, computed: int = 0, num_blocks: int = 0) -> SequenceFacts:
    return SequenceFacts(name, length, computed, num_blocks, 1000)


def test_decoding_sequences_go_before_prompts() -> None:
    plan = plan_step([_prompt("p", 100, 8, 2), _decoding("d")], [], 9, LIMITS)
    assert plan.chunks == (Chunk("d", 9, 1), Chunk("p", 8, 31))


def test_prompt_is_cut_at_the_token_budget() -> None:
    plan = plan_step([], [_prompt("p", 100)], 9, LIMITS)
    assert (plan.admit, plan.chunks) == (("p",), (Chunk("p", 0, 32),))


def test_waiting_sequence_without_blocks_blocks_those_behind_it() -> None:
    plan = plan_step([], [_prompt("big", 5 * BLOCK_POSITIONS), _prompt("small", 3)], 3, LIMITS)
    assert plan.admit == ()


def test_admission_stops_at_max_running() -> None:
    running = [_decoding(f"r{i}") for i in range(3)]
    plan = plan_step(running, [_prompt("a", 3), _prompt("b", 3)], 9, LIMITS)
    assert plan.admit == ("a",)


def test_admission_asks_for_no_more_than_the_sequence_can_use() -> None:
    short = SequenceFacts("s", 10, 0, 0, 12)
    assert plan_step([], [short], 1, LIMITS).admit == ("s",)


def test_exhaustion_preempts_the_youngest_and_admits_nobody() -> None:
    full = BLOCK_POSITIONS + 1
    running = [_decoding("old", full, 1), _decoding("young", full, 1)]
    plan = plan_step(running, [_prompt("w", 1)], 0, LIMITS)
    assert (plan.preempt, plan.admit) == (("young",), ())
    assert plan.chunks == (Chunk("old", BLOCK_POSITIONS, 1),)


def test_random_plans_stay_within_blocks_and_tokens() -> None:
    chance = random.Random(5)
    for _ in range(500):
        running = [
            _decoding(f"r{i}", length := chance.randint(2, 300), blocks_for(length - 1))
            for i in range(chance.randint(0, 4))
        ]
        waiting = [_prompt(f"w{i}", chance.randint(1, 300)) for i in range(chance.randint(0, 4))]
        num_free = chance.randint(1, 8)
        plan = plan_step(running, waiting, num_free, LIMITS)
        assert sum(chunk.count for chunk in plan.chunks) <= LIMITS.max_batch_tokens
        kept = [facts for facts in running if facts.name not in plan.preempt]
        released = sum(facts.num_blocks for facts in running if facts.name in plan.preempt)
        grown = sum(blocks_for(facts.num_tokens) - facts.num_blocks for facts in kept)
        taken = sum(
            blocks_for(min(facts.num_tokens + LIMITS.admission_reserve, facts.max_total))
            for facts in waiting
            if facts.name in plan.admit
        )
        assert grown + taken <= num_free + released or len(kept) <= 1
        assert not running or any(chunk.name == running[0].name for chunk in plan.chunks)


MOST_PAUSED = 24


def test_prompt_beside_a_stream_goes_into_a_pass_of_its_own() -> None:
    plan = plan_step([_prompt("p", 100, 8, 2), _decoding("d")], [], 9, LIMITS, MOST_PAUSED)
    assert (plan.chunks, plan.paused) == ((Chunk("d", 9, 1),), (Chunk("p", 8, 24),))


def test_prompts_without_streams_have_whole_steps() -> None:
    plan = plan_step([_prompt("p", 100, 8, 2)], [], 9, LIMITS, MOST_PAUSED)
    assert (plan.chunks, plan.paused) == ((), (Chunk("p", 8, 32),))


def test_short_prompts_overtake_an_open_pass_whole_and_shortest_first() -> None:
    in_pass = _prompt("p", 100, 8, 2)._replace(is_in_pass=True)
    prompts = [_prompt("longest", 90, 0, 2), _prompt("long", 13, 0, 1), _prompt("short", 9, 0, 1)]
    for streams in ((), (_decoding("d"),)):
        plan = plan_step([in_pass, *streams, *prompts], [], 9, replace(LIMITS, max_running=9), MOST_PAUSED)
        assert plan.chunks == tuple(Chunk(facts.name, 9, 1) for facts in streams)
        assert plan.paused == (Chunk("short", 0, 9), Chunk("long", 0, 13))
        assert plan_step([in_pass, *streams, *prompts], [], 9, LIMITS, 8).paused == ()


def test_short_prompts_do_not_wait_for_a_long_one_nor_it_for_them() -> None:
    running = [_prompt("long", 500, 0, 8), _prompt("middle", 40, 0, 1), _prompt("short", 6, 0, 1)]
    plan = plan_step(running, [], 9, LIMITS)
    assert plan.chunks == (Chunk("long", 0, 16), Chunk("short", 0, 6), Chunk("middle", 0, 10))
    plan = plan_step([running[0], running[2]], [], 9, LIMITS)
    assert plan.chunks == (Chunk("long", 0, 26), Chunk("short", 0, 6)), (
        "what the others leave is the oldest's"
    )
