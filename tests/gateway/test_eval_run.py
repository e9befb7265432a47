"""An evaluation scores as the published model would, the same to the bit at any budget, and counts experts."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from experts.budget import BudgetRequest
from gateway.errors import EvaluationFailed, FileUnusable, OptionInvalid
from gateway.evaluation.report import as_json
from gateway.evaluation.routing import by_text
from gateway.evaluation.run import EvalOptions, EvalText, Evaluation, evaluate, read_texts
from gateway.evaluation.statistics import estimate
from gateway.evaluation.windows import Sliding
from gateway.local.study import Study
from gateway.text.tokenizer import TextTokenizer
from router.routing_choice import RoutingChoice
from router.scoring import PRESETS
from router.trace_reader import read_trace
from router.trace_statistics import use_counts
from tests.reference import RELATIVE_TOLERANCE, load_published, random_prompt

TEXTS = [EvalText("first", random_prompt(70)), EvalText("second", tuple(range(10, 40)))]
OPTIONS = EvalOptions(Sliding(16, 6), dtype="float32")


def _evaluate(root: Path, options: EvalOptions = OPTIONS) -> Evaluation:
    return evaluate(root, lambda tokenizer: TEXTS, options)


def test_scores_are_those_of_the_published_model(tiny_store: Path, tiny_checkpoint: Path) -> None:
    evaluation = _evaluate(tiny_store)
    model = load_published(tiny_checkpoint)
    for score in evaluation.texts:
        ids = score.text.ids
        for found in score.windows:
            window = found.window
            with torch.no_grad():
                logits = model(torch.tensor([ids[window.first : window.end]])).logits[0]
            logprobs = torch.log_softmax(logits.double(), dim=-1)
            expected = [
                float(logprobs[place - window.first - 1, ids[place]])
                for place in range(window.scored_first, window.end)
            ]
            tolerance = 2 * RELATIVE_TOLERANCE * float(logits.abs().max())
            assert found.logprobs == pytest.approx(expected, abs=tolerance)
        assert sum(len(found.logprobs) for found in score.windows) == len(ids) - 1


def test_budget_and_rows_of_a_step_change_no_bit(tiny_store: Path) -> None:
    reference = _evaluate(tiny_store)
    one_expert = BudgetRequest(num_bytes=3 * 64 * 24 * 4)
    for options in (
        replace(OPTIONS, budgets=(one_expert,)),
        replace(OPTIONS, batch_tokens=5),
        replace(OPTIONS, batch_tokens=1, budgets=(BudgetRequest(num_bytes=10 * 3 * 64 * 24 * 4),)),
    ):
        found = _evaluate(tiny_store, options)
        assert [s.windows for s in found.texts] == [s.windows for s in reference.texts]


def test_every_load_is_counted_from_a_cold_cache(tiny_store: Path) -> None:
    roomy = _evaluate(tiny_store, replace(OPTIONS, batch_tokens=1))
    first, second = (score.experts for score in roomy.texts)
    assert first.misses == first.first_loads > 0
    assert second.misses == second.first_loads, "the second text finds what the first one left"
    computed = sum(w.window.end - w.window.first for score in roomy.texts for w in score.windows)
    report = as_json(roomy)
    assert report["hits"] + report["misses"] == computed * 2 * 2, (
        "two experts in two layers for each computed token"
    )
    assert report["computed_tokens"] == computed
    tight = _evaluate(
        tiny_store, replace(OPTIONS, batch_tokens=1, budgets=(BudgetRequest(num_bytes=3 * 64 * 24 * 4),))
    )
    record_bytes = tight.expert_bytes // 16
    assert as_json(tight)["bytes_read"] == as_json(tight)["misses"] * record_bytes
    assert as_json(tight)["budget_bytes"] == record_bytes


def test_eviction_changes_misses_and_no_score(tiny_store: Path) -> None:
    half = replace(OPTIONS, batch_tokens=1, budgets=(BudgetRequest(num_bytes=6 * 3 * 64 * 24 * 4),))
    lfu, lru = (_evaluate(tiny_store, replace(half, eviction=name)) for name in ("lfu", "lru"))
    assert [s.windows for s in lfu.texts] == [s.windows for s in lru.texts]
    assert (as_json(lfu)["eviction"], as_json(lru)["eviction"]) == ("lfu", "lru")
    assert as_json(lfu)["misses"] != as_json(lru)["misses"]


def test_report_has_totals_and_every_text(tiny_store: Path) -> None:
    evaluation = _evaluate(tiny_store)
    report = as_json(evaluation)
    wanted = {"perplexity", "misses", "hits", "bytes_read", "tokens", "tokens_per_s", "policy", "effort"}
    assert wanted | {"budget_bytes"} <= report.keys()
    assert (report["policy"], report["effort"], report["cache_start"]) == ("native", "focus", "cold")
    assert report["tokens"] == sum(text["tokens"] for text in report["texts"]) == 69 + 29
    nll = -math.fsum(p for s in evaluation.texts for w in s.windows for p in w.logprobs)
    assert report["perplexity"] == pytest.approx(math.exp(nll / 98))
    assert report["perplexity_95"] == estimate([s.clusters for s in evaluation.texts]).ratio_95


def test_other_routing_is_named_and_costs_quality_or_misses(tiny_store: Path) -> None:
    native = as_json(_evaluate(tiny_store))
    choices = (
        replace(OPTIONS, study=Study(mask="0:0-3")),
        replace(OPTIONS, routing=RoutingChoice("snarc", "focus"), snarc=PRESETS["scaled"]),
        replace(OPTIONS, routing=RoutingChoice("native", "wake")),
    )
    reports = [as_json(_evaluate(tiny_store, options)) for options in choices]
    assert [report["policy"] for report in reports] == ["masked", "snarc", "native"]
    assert [report["effort"] for report in reports] == ["focus", "focus", "wake"]
    assert len({report["nll"] for report in (native, *reports)}) == 4
    assert native["choice_misses"] is None and reports[1]["choice_misses"] is not None


def test_replay_of_its_own_trace_scores_the_same_bits(tiny_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    native = _evaluate(tiny_store, replace(OPTIONS, study=Study(trace=path)))
    replayed = _evaluate(tiny_store, replace(OPTIONS, batch_tokens=7, study=Study(replay=path)))
    assert [s.windows for s in replayed.texts] == [s.windows for s in native.texts]
    assert as_json(replayed)["policy"] == "replayed"


def test_trace_of_windows_becomes_one_of_texts(tiny_store: Path, tmp_path: Path) -> None:
    evaluation = _evaluate(tiny_store, replace(OPTIONS, study=Study(trace=tmp_path / "trace.parquet")))
    table = by_text(read_trace(tmp_path / "trace.parquet"), evaluation.windows)
    assert table.names == ("first", "second")
    assert int(use_counts(table).sum()) == (70 + 30) * 2 * 2
    assert table.tokens_N is not None
    for number, text in enumerate(TEXTS):
        of_layer_0 = (table.requests_N == number) & (table.layers_N == 0)
        assert sorted(table.positions_N[of_layer_0].tolist()) == list(range(len(text.ids)))
        for position, token in zip(table.positions_N[of_layer_0], table.tokens_N[of_layer_0], strict=True):
            assert text.ids[position] == token


def test_progress_counts_up_to_all_scored_tokens(tiny_store: Path) -> None:
    shown: list[tuple[int, int]] = []
    evaluate(tiny_store, lambda tokenizer: TEXTS, OPTIONS, lambda done, total: shown.append((done, total)))
    assert shown[0] == (0, 98) and shown[-1] == (98, 98)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)


def test_context_beyond_the_model_s_is_refused(tiny_store: Path) -> None:
    with pytest.raises(OptionInvalid, match="above what fits, 256 tokens"):
        _evaluate(tiny_store, replace(OPTIONS, sliding=Sliding(257, 100)))


def test_other_routing_does_not_go_with_a_policy() -> None:
    with pytest.raises(OptionInvalid, match="does not go with masked routing"):
        EvalOptions(study=Study(mask="0:0"), routing=RoutingChoice("snarc", "focus"))
    with pytest.raises(OptionInvalid, match="does not go with --replay-routing"):
        Study(mask="0:0", replay=Path("trace.parquet"))


def test_texts_are_named_by_their_files_and_cut(tiny_store: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.from_folder(tiny_store)
    paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "y.txt"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("some words")
    texts = read_texts(tokenizer, paths, 4)
    assert [text.name for text in texts] == [str(paths[0]), str(paths[1]), "y.txt"]
    assert all(len(text.ids) == 4 for text in texts)
    paths[2].write_text("")
    with pytest.raises(EvaluationFailed, match="leave nothing to score"):
        read_texts(tokenizer, paths, None)
    with pytest.raises(FileUnusable):
        read_texts(tokenizer, [tmp_path / "none.txt"], None)


HALF = (BudgetRequest(share=Fraction(1, 2)),)


def test_one_stream_counts_what_one_row_a_step_misses(tiny_store: Path) -> None:
    """The tiny model has two layers with experts, which a cache of all bytes would share; of equal shares each has
    half, so the one-row run is given the same by a budget that holds everything."""
    rowwise = as_json(_evaluate(tiny_store, replace(OPTIONS, batch_tokens=1)))
    stream = _evaluate(
        tiny_store, replace(OPTIONS, is_one_stream=True, budgets=(BudgetRequest(share=Fraction(1)),))
    )
    report = as_json(stream)
    for name in ("hits", "misses", "bytes_read", "perplexity"):
        assert report[name] == rowwise[name], name
    assert report["stand_ins"] == 0


def test_one_stream_misses_more_with_less_and_changes_no_score_under_native_routing(tiny_store: Path) -> None:
    reference = _evaluate(tiny_store)
    found = _evaluate(tiny_store, replace(OPTIONS, is_one_stream=True, budgets=HALF))
    assert [score.windows for score in found.texts] == [score.windows for score in reference.texts]
    report = as_json(found)
    assert report["misses"] > as_json(reference)["first_loads"]
    assert report["budget_bytes"] * 2 == report["expert_bytes"]


def test_one_stream_lets_means_stand_in(stories_store: Path) -> None:
    texts = [EvalText("tokens", random_prompt(600))]
    options = EvalOptions(Sliding(128, 64), is_one_stream=True, budgets=HALF, routing=RoutingChoice("snarc"))
    evaluation = evaluate(stories_store, lambda tokenizer: texts, options)
    report = as_json(evaluation)
    assert report["stand_ins"] > 0
    uses = report["hits"] + report["misses"] + report["stand_ins"]
    assert uses == report["computed_tokens"] * 6 * 8
    assert report["choice_misses"] == report["misses"]


def test_one_stream_needs_room_for_an_expert_a_layer(tiny_store: Path) -> None:
    with pytest.raises(OptionInvalid, match="one expert a layer"):
        _evaluate(tiny_store, replace(OPTIONS, is_one_stream=True, budgets=(BudgetRequest(num_bytes=100),)))


def test_one_stream_has_a_routing_of_its_own(tiny_store: Path) -> None:
    with pytest.raises(OptionInvalid, match="neither --mask-experts nor --replay-routing"):
        _evaluate(tiny_store, replace(OPTIONS, is_one_stream=True, study=Study(mask="0:0-3")))
