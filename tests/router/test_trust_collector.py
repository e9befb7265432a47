"""Watching changes no bit; what is seen reaches the right experts, alone or in a batch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.errors import LedgerUnusable
from experts.trust import (
    ASPECTS,
    CONVERGENCE,
    EFFICIENCY,
    STABILITY,
    TrustReport,
    TrustSettings,
    TrustTable,
    aspect_scores,
)
from experts.trust_ledger import TrustIdentity, TrustLedger, ledger_path, read_ledger
from experts.trust_reporter import TrustKeeper
from extraction.manifest import ExpertKey
from router.batcher import BatchLimits
from router.loading import EngineOptions, LoadedEngine
from router.media.items import PlacedMedium, Sound
from router.moe_block import MoeBlock
from router.request import GenerationRequest, SamplingParams
from router.step_routing import NativePolicy, RoutingWatcher, SpanOwner, StepRouting
from router.trust_collector import MAX_REQUESTS, REWARD_WEIGHT, TrustCollector
from router.trust_options import TrustOptions
from router.trust_session import TrustSession, trust_identity
from router.trust_signals import sampled_positions
from tests.engines import Outcome, assert_same_bits, open_engine, run_to_end

REQUESTS = [
    GenerationRequest(
        f"r{index}",
        tuple((index * 7 + step * 3) % 90 for step in range(length)),
        SamplingParams(max_tokens=6, seed=index),
        num_logprobs=2,
        num_prompt_logprobs=1 if index % 2 else None,
    )
    for index, length in enumerate((1, 40, 60, 90))
]

EVERY_PASS = TrustOptions("/unused", layers_a_look=1)


def _collected(root: Path) -> tuple[LoadedEngine, TrustCollector, Outcome]:
    loaded = open_engine(root, EngineOptions())
    identity = trust_identity(loaded.store)
    session = TrustSession(loaded.store, loaded.config, EVERY_PASS, _keep_nothing)
    session.attach(loaded.engine)
    assert identity.layers == tuple(sorted(loaded.config.moe_layers))
    outcome = run_to_end(loaded.engine, REQUESTS, [0, 0, 2, 3])
    session.collector.flush()
    return loaded, session.collector, outcome


def _keep_nothing(identity: TrustIdentity, options: TrustOptions) -> TrustKeeper:
    raise LedgerUnusable("nowhere", "this test keeps nothing")


def test_watched_engine_has_the_same_bits(tiny_store: Path) -> None:
    plain = open_engine(tiny_store, EngineOptions())
    reference = run_to_end(plain.engine, REQUESTS, [0, 0, 2, 3])
    plain.close()
    loaded, _, outcome = _collected(tiny_store)
    assert_same_bits(outcome, reference)
    for name, rows in reference.logits.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, outcome.logits[name], strict=True))
    loaded.close()


def test_every_aspect_is_observed_and_tokens_are_counted(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    table = collector.book.view()
    stats = loaded.engine.stats
    assert table.num_tokens == stats.prompt_tokens + stats.generated_tokens - len(REQUESTS)
    assert (table.counts_ALE.sum(axis=(1, 2)) > 0).all()
    scores = aspect_scores(table, TrustSettings())
    assert scores.min() >= 0 and scores.max() <= 1
    loaded.close()


def test_sampled_positions_share_one_observation_among_their_experts(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    table = collector.book.view()
    num_sampled = sum(len(sampled_positions(len(request.prompt_ids))) for request in REQUESTS)
    num_chosen = loaded.config.experts_per_token
    assert table.bucket_weights_B.sum() == pytest.approx(num_sampled, rel=1e-2)
    # The first token of a bucket has nothing to be compared with.
    per_layer = table.counts_ALE[CONVERGENCE].sum(axis=1)
    assert (per_layer % num_chosen == 0).all() and (per_layer == per_layer[0]).all()
    assert 0 < per_layer[0] <= num_sampled * num_chosen
    weights = table.weights_ALE[CONVERGENCE].sum(axis=1)
    np.testing.assert_allclose(weights, per_layer / num_chosen, rtol=1e-2)
    loaded.close()


def test_tokens_that_stand_for_media_are_not_taken_for_foreseen(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    ids = (*range(100), *[7] * 100, *range(8, 60))
    text = GenerationRequest("r", ids)
    media = replace(text, media=(PlacedMedium(100, Sound(b"")),))
    sampled = collector.positions(SpanOwner(text, 0, len(ids)))
    kept = [position for position in sampled if ids[position + 1] != 7]
    assert 0 < len(kept) < len(sampled)
    assert collector.positions(SpanOwner(media, 0, len(ids))) == kept
    loaded.close()


def test_layers_take_turns(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    seen = collector.book.view().counts_ALE[EFFICIENCY].sum(axis=1)
    assert (seen > 0).all()
    assert collector.book.view().counts_ALE[STABILITY].any(axis=1).all()
    loaded.close()


def test_reward_moves_trust_of_the_experts_that_served_the_request(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    before = aspect_scores(collector.book.view(), TrustSettings())[CONVERGENCE]
    assert collector.reward("r1", 1.0)
    praised = aspect_scores(collector.book.view(), TrustSettings())[CONVERGENCE]
    for _ in range(3):
        assert collector.reward("r1", -1.0)
    blamed = aspect_scores(collector.book.view(), TrustSettings())[CONVERGENCE]
    is_moved = praised != before
    assert is_moved.any() and not is_moved.all()
    assert (praised[is_moved] > before[is_moved]).all()
    assert (blamed[is_moved] < before[is_moved]).all()
    assert (blamed[~is_moved] == before[~is_moved]).all()
    loaded.close()


def test_reward_of_an_unknown_request_changes_nothing(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    before = collector.book.view()
    assert not collector.reward("nobody", 1.0)
    assert collector.book.view() is before
    loaded.close()


@pytest.mark.parametrize("score", [1.01, -2.0, float("nan"), float("inf")])
def test_reward_out_of_range_is_refused(tiny_store: Path, score: float) -> None:
    loaded, collector, _ = _collected(tiny_store)
    with pytest.raises(ValueError, match="from -1 to 1"):
        collector.reward("r1", score)
    loaded.close()


def test_oldest_request_is_forgotten_first(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    one_token = SamplingParams(max_tokens=1, temperature=0.0)
    run_to_end(loaded.engine, [GenerationRequest(f"n{i}", (i % 90,), one_token) for i in range(64)])
    assert collector.reward("n63", 0.5) and collector.reward("r0", 0.5)
    for first in range(64, MAX_REQUESTS, 64):
        names = [f"n{index}" for index in range(first, first + 64)]
        run_to_end(loaded.engine, [GenerationRequest(name, (1,), one_token) for name in names])
    assert not collector.reward("r0", 0.5)
    assert collector.reward(f"n{MAX_REQUESTS - 1}", 0.5)
    loaded.close()


def test_scores_of_the_book_are_those_of_its_keys(tiny_store: Path) -> None:
    loaded, collector, _ = _collected(tiny_store)
    book = collector.book
    component = loaded.store.served.name
    for layer in sorted(loaded.config.moe_layers):
        scores = book.scores(component, layer)
        assert scores.shape == (loaded.config.num_experts,) and scores.dtype == torch.float32
        keys = [ExpertKey(component, layer, expert) for expert in range(len(scores))]
        assert scores.tolist() == pytest.approx([book.score(key) for key in keys])
        assert len(set(scores.tolist())) > 1
    assert book.score(ExpertKey("talker", 0, 0)) == 0.5
    assert book.score(ExpertKey(component, 1, 0)) == 0.5, "a layer without experts"
    assert book.score(ExpertKey(component, 0, 10**6)) == 0.5
    loaded.close()


def test_restarted_engine_begins_with_what_the_last_one_learned(tiny_store: Path, tmp_path: Path) -> None:
    options = EngineOptions(trust=TrustOptions(str(tmp_path)))
    tables: list[TrustTable] = []
    for _ in range(2):
        loaded = open_engine(tiny_store, options)
        assert loaded.trust is not None
        identity = trust_identity(loaded.store)
        path = ledger_path(tmp_path, loaded.store.hash)
        run_to_end(loaded.engine, REQUESTS)
        assert loaded.trust.status()["is_kept"]
        loaded.close()
        tables.append(read_ledger(path, identity))
    assert tables[0].num_tokens > 0
    assert tables[1].num_tokens == 2 * tables[0].num_tokens
    assert (tables[1].counts_ALE >= tables[0].counts_ALE).all()


def test_second_engine_of_a_store_learns_without_keeping(
    tiny_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = EngineOptions(trust=TrustOptions(str(tmp_path)))
    first = open_engine(tiny_store, options)
    with caplog.at_level(logging.WARNING):
        second = open_engine(tiny_store, options)
    assert "learned but not kept" in caplog.text
    assert second.trust is not None and not second.trust.status()["is_kept"]
    run_to_end(second.engine, REQUESTS[:1])
    second.close()
    first.close()
    assert read_ledger(ledger_path(tmp_path, first.store.hash), trust_identity(first.store)).num_tokens == 0


class _FlakyKeeper:
    """Keeps what it is told, but says that it failed the first time."""

    def __init__(self, ledger: TrustLedger) -> None:
        self._ledger = ledger
        self.sequences: list[int] = []

    def table(self) -> TrustTable:
        return self._ledger.table()

    def add(self, report: TrustReport) -> TrustTable:
        table = self._ledger.add(report)
        self.sequences.append(report.sequence)
        if len(self.sequences) == 1:
            raise LedgerUnusable("far away", "no answer")
        return table

    def close(self) -> None:
        self._ledger.close()


def test_report_whose_answer_was_lost_counts_once(tiny_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    identity = trust_identity(loaded.store)
    keeper = _FlakyKeeper(TrustLedger(tmp_path / "ledger.sqlite3", identity))
    session = TrustSession(loaded.store, loaded.config, TrustOptions("/unused"), lambda *_: keeper)
    session.attach(loaded.engine)
    run_to_end(loaded.engine, REQUESTS)
    session.close()
    loaded.close()
    assert keeper.sequences[:2] == [1, 1]
    kept = read_ledger(tmp_path / "ledger.sqlite3", identity)
    assert kept.num_tokens == session.book.view().num_tokens
    assert (kept.counts_ALE == session.book.view().counts_ALE).all()
    assert len(ASPECTS) == kept.counts_ALE.shape[0]


def test_layers_that_it_does_not_look_at_are_computed_in_one_call(tiny_store: Path) -> None:
    """One in turn is shown to it; of a prompt's positions whose NLL it asks for, it is told all others' choices."""
    loaded, collector, _ = _collected(tiny_store)
    layers = sorted(loaded.config.moe_layers)
    prompt, answer = (1, 2, 3, 4, 5), (6, 7)
    request = GenerationRequest("q", prompt, SamplingParams(max_tokens=9))
    assert collector.wanted([SpanOwner(request, 0, len(prompt), prompt)]).has_choices
    turns = []
    for position in range(2 * len(layers)):
        owner = SpanOwner(request, len(prompt) + position, 1, prompt + answer)
        shown = StepRouting((owner,), NativePolicy(), (collector,)).shown()
        assert shown.layers is not None and not shown.has_choices
        turns += shown.layers
    assert sorted(turns) == sorted(layers * 2)


@pytest.mark.parametrize(("layers_a_look", "passes_a_look"), [(1, 1), (2, 1), (6, 3), (48, 24)])
def test_one_layer_of_so_many_is_looked_at_in_turn_but_no_more_than_one_a_pass(
    tiny_store: Path, layers_a_look: int, passes_a_look: int
) -> None:
    options = replace(EVERY_PASS, layers_a_look=layers_a_look)
    loaded = open_engine(tiny_store, EngineOptions())
    collector = TrustSession(loaded.store, loaded.config, options, _keep_nothing).collector
    layers = sorted(loaded.config.moe_layers)
    assert len(layers) == 2
    request = GenerationRequest("q", (1, 2), SamplingParams(max_tokens=9))
    shown = [collector.wanted([SpanOwner(request, 2 + n, 1)]).layers for n in range(4 * passes_a_look)]
    looks = [layer for view in shown if view for layer in view]
    assert looks == layers * 2
    assert [number for number, view in enumerate(shown) if view] == list(range(0, len(shown), passes_a_look))
    loaded.close()


def test_reward_reaches_the_experts_of_a_prompt_in_every_layer_however_seldom_one_is_looked_at(
    tiny_store: Path,
) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    session = TrustSession(loaded.store, loaded.config, TrustOptions("/unused"), _keep_nothing)
    session.attach(loaded.engine)
    run_to_end(loaded.engine, REQUESTS[1:2], [0])
    session.collector.flush()
    before = session.book.view().weights_ALE[CONVERGENCE].sum(axis=1)
    assert session.collector.reward("r1", 1.0)
    given = session.book.view().weights_ALE[CONVERGENCE].sum(axis=1) - before
    np.testing.assert_allclose(given, REWARD_WEIGHT, rtol=1e-2)
    loaded.close()


class _Everything(RoutingWatcher):
    """Makes every layer go call by call."""


def test_one_call_computes_a_layer_where_nobody_looks_and_teaches_the_same(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    whole = MoeBlock.forward

    def forward(self: MoeBlock, *given: Any) -> torch.Tensor:
        shown.append(self.layer)
        return whole(self, *given)

    monkeypatch.setattr(MoeBlock, "forward", forward)
    views, outcomes, passes = [], [], []
    for others in ((), (_Everything(),)):
        options = EngineOptions(
            limits=BatchLimits(is_paced=False)
        )  # else passes come in an order of their own
        loaded = open_engine(tiny_store, options)
        if loaded.engine.backbone.layers[0].native is None:
            pytest.skip("needs our own products, which a C compiler makes")
        while loaded.worker.load_more():
            pass
        session = TrustSession(loaded.store, loaded.config, EVERY_PASS, _keep_nothing)
        session.attach(loaded.engine)
        loaded.engine.watchers += others
        shown.clear()
        outcomes.append(run_to_end(loaded.engine, REQUESTS, [0, 0, 2, 3]))
        passes.append(len(shown))
        session.collector.flush()
        views.append(session.book.view())
        num_layers = len(loaded.config.moe_layers)
        loaded.close()
    assert_same_bits(*outcomes)
    for ours, theirs in zip(
        *((view.sums_ALE, view.weights_ALE, view.counts_ALE) for view in views), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert passes[0] * num_layers == passes[1], "one layer of each pass"
