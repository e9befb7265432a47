"""Memory figures against sums made by hand from the files."""

from __future__ import annotations

import json
from pathlib import Path

from extraction.summary import summarize


def test_totals_are_those_of_the_files(stories_store: Path) -> None:
    summary = summarize(stories_store)
    expert = 3 * 48 * 256 * 2
    backbone = sum(nbytes for name, nbytes in summary.bytes_by_component.items() if name != "experts")
    assert (summary.num_layers, summary.num_moe_layers, summary.experts_per_layer) == (6, 6, 64)
    assert (summary.expert_bytes, summary.num_experts) == (expert, 384)
    assert summary.bytes_by_component["embeddings"] == 4096 * 256 * 2
    assert summary.bytes_by_component["head"] == 0
    assert summary.bytes_by_component["experts"] == 384 * expert
    by_state = {total.state: total.total_bytes for total in summary.totals}
    assert by_state == {
        "WAKE (k=4, reduced)": backbone + 6 * 4 * expert,
        "FOCUS (k=8, native)": backbone + 6 * 8 * expert,
        "CRISIS (k=16)": backbone + 6 * 16 * expert,
        "all experts": backbone + 384 * expert,
    }


def test_memory_table_leads_with_the_whole_process(stories_store: Path) -> None:
    summary = summarize(stories_store)
    first, *parts, last_layer = summary.memory_table
    assert first.component == "whole process"
    assert first.monolithic_bytes == sum(row.monolithic_bytes for row in parts)
    assert first.selective_bytes == sum(row.selective_bytes for row in parts)
    assert 0.75 < first.reduction < last_layer.reduction == 0.875


def test_summary_is_plain_json(tiny_store: Path) -> None:
    text = json.dumps(summarize(tiny_store).as_json())
    assert json.loads(text)["num_moe_layers"] == 2
