"""Signals against their formulas, their range, and their indifference to chunks and neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from experts.native_products import library
from router.native_signals import conflict_of
from router.signal_memory import MemorySpan, SignalMemory
from router.snarc import GAIN_POSITIONS, RECENT, WINDOW, Sketch, conflict

NUM_PROMPT = 150
SHAPES = [(96, 16, torch.float32), (2048, 128, torch.bfloat16)]


WAYS = (None, *((FOUND.best_level,) if (FOUND := library()) is not None else ()))
"""PyTorch's operations, and our own."""


@pytest.fixture(params=WAYS)
def level(request: pytest.FixtureRequest) -> str | None:
    found: str | None = request.param
    return found


class _Request:
    """Random hidden states and gate logits of one request."""

    def __init__(
        self, width: int, num_experts: int, dtype: torch.dtype, level: str | None, count: int = 200
    ) -> None:
        self.level = level
        generator = torch.Generator().manual_seed(width)
        self.hidden_TD = torch.randn(count, width, generator=generator).to(dtype)
        self.logits_TE = torch.randn(count, num_experts, generator=generator) * 3
        self.sketch = Sketch.for_width(width)

    def signals(
        self, chunks: Sequence[int], num_beside: int = 0, memory: SignalMemory | None = None
    ) -> Tensor:
        """(5, T), computed in chunks, below rows of another request in each step."""
        memory, level = memory or SignalMemory(self.sketch, 4), self.level
        found, first = [], 0
        for count in chunks:
            spans = [MemorySpan("own", NUM_PROMPT, first, count)]
            hidden_TD = self.hidden_TD[first : first + count]
            logits_TE = self.logits_TE[first : first + count]
            if num_beside:
                spans.insert(0, MemorySpan("other", 40, first % 7, num_beside))
                hidden_TD = torch.cat((torch.randn(num_beside, hidden_TD.shape[1]).to(hidden_TD), hidden_TD))
                logits_TE = torch.cat((torch.randn(num_beside, logits_TE.shape[1]), logits_TE))
            index = memory.index(spans)
            past = memory.follow(3, index, hidden_TD, (True, True, True), level)
            conflict_T = conflict(logits_TE) if level is None else conflict_of(level, logits_TE)
            reward_T = memory.settled_reward(3, index)
            if reward_T is None:
                reward_T = memory.recall_reward(3, index, 1.0 - conflict_T)
            parts = [part for part in (*past, reward_T, conflict_T) if part is not None]
            memory.keep(index)
            found.append(torch.stack(parts)[:, num_beside:])
            first += count
        return torch.cat(found, dim=1)


@pytest.mark.parametrize(("width", "num_experts", "dtype"), SHAPES)
def test_signals_have_the_same_bits_in_any_chunks_and_beside_anybody(
    width: int, num_experts: int, dtype: torch.dtype, level: str | None
) -> None:
    request = _Request(width, num_experts, dtype, level)
    whole = request.signals([200])
    for chunks, num_beside in (([1] * 200, 0), ([7] * 28 + [4], 3), ([100, 1, 99], 12), ([64, 136], 1)):
        assert torch.equal(request.signals(chunks, num_beside), whole)


def test_a_request_computed_again_gets_the_same_signals_whoever_was_there_before(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    memory = SignalMemory(request.sketch, 4)
    first = request.signals([150, 50], memory=memory)
    assert torch.equal(request.signals([200], memory=memory), first), "computed again from its beginning"
    memory.forget("own")
    assert torch.equal(request.signals([20, 180], 2, memory), first), "in a slot that was used before"


def test_other_steps_may_come_between_layers_and_an_unfinished_one_leaves_nothing(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    expected = request.signals([16, 4, 20])
    memory = SignalMemory(request.sketch, 4)
    first = request.signals([16], memory=memory)
    for end in (20, 40):  # the first of them is not kept, as if its pass had been dropped
        dropped = memory.index([MemorySpan("own", NUM_PROMPT, 16, end - 16)])
        memory.follow(0, dropped, request.hidden_TD[16:end], (True, True, True), level)
    index = memory.index([MemorySpan("own", NUM_PROMPT, 16, 4)])
    for number in range(9):  # more requests than there are slots: the rings grow
        other = memory.index([MemorySpan(f"other {number}", 3, 0, 1)])
        memory.follow(3, other, torch.randn(1, 96), (True, True, True), level)
        memory.keep(other)
    found = memory.follow(3, index, request.hidden_TD[16:20], (True, True, True), level)
    memory.keep(index)
    assert torch.equal(torch.stack([part for part in found if part is not None]), expected[:3, 16:20])
    index = memory.index([MemorySpan("own", NUM_PROMPT, 20, 20)])
    found = memory.follow(3, index, request.hidden_TD[20:40], (True, True, True), level)
    assert torch.equal(torch.stack([part for part in found if part is not None]), expected[:3, 20:40])
    assert torch.equal(first, expected[:, :16])


def test_a_step_does_not_write_into_the_slot_of_a_request_that_ended_meanwhile(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    memory = SignalMemory(request.sketch, 4)
    step = memory.index([MemorySpan("ended", 9, 0, 3), MemorySpan("other", 9, 0, 2)])
    memory.follow(3, step, torch.randn(5, 96), (True, True, True), level)
    memory.forget("ended")
    request.signals([20], memory=memory)  # in the slot that has become free
    memory.keep(step)
    again = memory.index([MemorySpan("own", NUM_PROMPT, 20, 20)])
    found = memory.follow(3, again, request.hidden_TD[20:40], (True, True, True), level)
    expected = request.signals([20, 20])[:3, 20:]
    assert torch.equal(torch.stack([part for part in found if part is not None]), expected)


def test_a_name_that_comes_again_is_another_request(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    memory = SignalMemory(request.sketch, 4)
    stale = memory.index([MemorySpan("own", NUM_PROMPT, 0, 9), MemorySpan("other", 9, 0, 2)])
    memory.follow(3, stale, torch.randn(11, 96), (True, True, True), level)
    memory.forget("own")
    request.signals([20], memory=memory)  # in the same slot
    memory.keep(stale)
    again = memory.index([MemorySpan("own", NUM_PROMPT, 20, 20)])
    found = memory.follow(3, again, request.hidden_TD[20:40], (True, True, True), level)
    expected = request.signals([20, 20])[:3, 20:]
    assert torch.equal(torch.stack([part for part in found if part is not None]), expected)


def test_slots_grow_and_are_used_again() -> None:
    memory = SignalMemory(Sketch.for_width(8), 1)
    for _ in range(3):
        index = memory.index([MemorySpan(f"r{i}", 9, 0, 1) for i in range(40)])
        memory.follow(0, index, torch.ones(40, 8), (True, True, True))
        memory.keep(index)
        for number in range(40):
            memory.forget(f"r{number}")
    assert memory.num_requests == 0
    index = memory.index([MemorySpan("late", 9, 1, 1)])
    assert int(index.past_TW.max()) < 64 * WINDOW, "three rounds of 40 need no more than 64 slots"


def test_signals_equal_their_formulas_one_token_at_a_time(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    found = request.signals([200])
    sketch_TS = (request.hidden_TD.view(200, *request.sketch.signs_GS.shape) * request.sketch.signs_GS).sum(1)
    lengths = sketch_TS.norm(dim=-1)
    units = sketch_TS / lengths.unsqueeze(-1)
    probabilities = request.logits_TE.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1) / torch.tensor(16.0).log()
    for position in (1, 3, 9, 40, 149, 150, 180):
        before = units[max(0, position - WINDOW) : position]
        predicted = units[max(0, position - RECENT) : position].mean(0)
        expected = torch.stack(
            (
                (units[position] - predicted).norm() / (1 + predicted.norm()),
                1 - (before @ units[position]).max().clamp(0, 1),
                lengths[position]
                / (lengths[position] + lengths[max(0, position - WINDOW) : position].mean()),
                _gain(1 - entropy, min(position, NUM_PROMPT)),
                entropy[position],
            )
        )
        torch.testing.assert_close(found[:, position], expected, rtol=1e-4, atol=1e-4)


def _gain(confidence_T: Tensor, end: int) -> Tensor:
    if end < 2 * GAIN_POSITIONS:
        return torch.tensor(0.5)
    newer = confidence_T[end - GAIN_POSITIONS : end].sum()
    older = confidence_T[end - 2 * GAIN_POSITIONS : end - GAIN_POSITIONS].sum()
    return newer / (newer + older)


def test_first_token_is_all_new_and_signals_stay_in_range(level: str | None) -> None:
    found = _Request(96, 16, torch.float32, level).signals([200])
    assert found[:4, 0].tolist() == [1.0, 1.0, 1.0, 0.5]
    assert float(found.min()) >= 0.0 and float(found.max()) <= 1.0


def test_repeated_state_is_neither_surprising_nor_novel_and_an_opposite_one_is(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    request.hidden_TD[:] = request.hidden_TD[0]
    request.hidden_TD[100] = -request.hidden_TD[0]
    found = request.signals([200])
    assert found[:2, 50].tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    assert found[:2, 100].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_zero_states_and_equal_or_certain_gates_give_finite_signals(level: str | None) -> None:
    request = _Request(96, 16, torch.float32, level)
    request.hidden_TD.zero_()
    request.logits_TE[:50] = 2.0
    request.logits_TE[50:, 0] = 1e4
    found = request.signals([200])
    assert bool(torch.isfinite(found).all())
    assert found[4, 10] == pytest.approx(1.0) and found[4, 60] == pytest.approx(0.0, abs=1e-6)


def test_sketch_keeps_angles_nearly() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 2048, generator=generator)
    b = a + 0.5 * torch.randn(200, 2048, generator=generator)
    direction_a, _ = Sketch.for_width(2048).of(a)
    direction_b, _ = Sketch.for_width(2048).of(b)
    error = (direction_a * direction_b).sum(-1) - torch.cosine_similarity(a, b)
    assert float(error.abs().mean()) < 0.1
