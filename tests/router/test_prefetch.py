"""The guess of the next layer's experts, and that a model answers with the same bits whatever is done with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from experts import cache as cache_module
from experts.call import ExpertCall
from experts.directory import LocalDirectory
from router.batcher import BatchLimits
from router.loading import EngineOptions
from router.prefetch import likely_experts
from router.request import GenerationRequest, SamplingParams
from tests.engines import assert_same_bits, open_engine, run_to_end

REQUESTS = [
    GenerationRequest(
        f"r{length}",
        tuple(random.Random(length).randrange(200) for _ in range(length)),
        SamplingParams(max_tokens=12, temperature=0.8, seed=length),
    )
    for length in (1, 17, 40)
]


class ListeningDirectory(LocalDirectory):
    """Keeps hints and calls in the order in which they come."""

    def __init__(self, worker: object) -> None:
        super().__init__(worker)  # type: ignore[arg-type]
        self.heard: list[tuple[str, int, tuple[int, ...]]] = []

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        self.heard.append(("hint", layer, tuple(experts)))
        super().prefetch(component, layer, experts)

    def table(self, component: str, layer: int) -> None:
        """So that every call comes to `run`."""

    def run(self, call: ExpertCall) -> torch.Tensor:
        self.heard.append(("call", call.layer, call.experts))
        return super().run(call)


def test_one_row_wants_its_best_experts_best_first() -> None:
    assert likely_experts(torch.tensor([[0.1, 3.0, -1.0, 2.0]]), 2) == [1, 3]


def test_rows_are_counted_by_how_much_they_want_an_expert() -> None:
    """Three rows are sure of expert 2, one is of expert 0, and the second choices are weak."""
    logits_TE = torch.tensor([[9.0, 0, 0, 1], [0, 0, 9, 1], [0, 1, 9, 0], [0, 1, 9, 0]])
    assert likely_experts(logits_TE, 2) == [2, 0, 1, 3]
    assert likely_experts(logits_TE, 1) == [2, 0]


def test_a_row_of_no_numbers_is_no_error() -> None:
    assert set(likely_experts(torch.full((1, 4), torch.nan), 2)) <= set(range(4))


def test_each_layer_with_experts_but_the_first_is_guessed_just_before_it_is_asked(
    stories_store: Path,
) -> None:
    loaded = open_engine(stories_store, EngineOptions(prefetch=True), ListeningDirectory)
    run_to_end(loaded.engine, REQUESTS[:1])
    assert isinstance(loaded.directory, ListeningDirectory)
    heard = loaded.directory.heard
    first = min(loaded.config.moe_layers)
    calls = [index for index, (kind, layer, _) in enumerate(heard) if kind == "call" and layer > first]
    assert calls and len(heard) == len(calls) * 2 + sum(layer == first for _, layer, _ in heard)
    for index in calls:
        kind, layer, guess = heard[index - 1]
        assert (kind, layer) == ("hint", heard[index][1])
        assert len(guess) == loaded.config.experts_per_token
    shares = [len(set(heard[index - 1][2]) & set(heard[index][2])) / len(heard[index][2]) for index in calls]
    chance = loaded.config.experts_per_token / loaded.config.num_experts
    assert sum(shares) / len(shares) > 2 * chance, "a guess from the layer before is far better than none"
    loaded.close()


def test_nothing_is_hinted_unless_asked_for(stories_store: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions(), ListeningDirectory)
    run_to_end(loaded.engine, REQUESTS[:1])
    assert isinstance(loaded.directory, ListeningDirectory)
    assert {kind for kind, _, _ in loaded.directory.heard} == {"call"}
    loaded.close()


@pytest.mark.parametrize("num_budget", [1, 5, 12])
@pytest.mark.parametrize("name", ["stories", "tiny"])
def test_prefetching_at_any_budget_equals_unlimited(
    name: str, num_budget: int, stories_store: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched, in chunks, with requests that join; the small experts are taken for large ones."""
    monkeypatch.setattr(cache_module, "MIN_PARALLEL_BYTES", 1)
    root = {"stories": stories_store, "tiny": tiny_store}[name]
    plain = open_engine(root, EngineOptions())
    reference = run_to_end(plain.engine, REQUESTS)
    expert_bytes = plain.worker.resident_bytes // plain.worker.num_resident
    plain.close()
    options = EngineOptions(
        expert_budget_bytes=num_budget * (expert_bytes + 8192),
        prefetch=True,
        limits=BatchLimits(max_batch_tokens=24),
    )
    loaded = open_engine(root, options)
    assert_same_bits(run_to_end(loaded.engine, REQUESTS, (0, 2, 3)), reference)
    stats = loaded.worker.stats
    if num_budget > 1 or name == "stories":
        assert stats.prefetched > 0
    assert (
        loaded.worker.resident_bytes
        <= loaded.worker.cache.allocated_bytes
        <= num_budget * (expert_bytes + 8192)
    )
    loaded.close()
