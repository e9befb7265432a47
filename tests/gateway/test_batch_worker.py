"""Rows through an engine: the same tokens as alone, stop strings, errors, and a batch that stays full."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experts.store import ExpertStore
from gateway.batch.job import BatchOptions, compute_here, run_batch
from gateway.batch.output import PartSummary
from gateway.batch.plan import PART_ROWS, Part, RowDefaults, row_seed
from gateway.batch.worker import WorkerSpec
from gateway.errors import BatchFailed, BatchOutputRefused
from gateway.local.generate import generate
from gateway.text.tokenizer import TextTokenizer
from router.engine import EXPERT_FAILED
from router.loading import EngineOptions, load_engine
from router.request import TokenEvent
from tests.gateway import batch_kills
from tests.gateway.batch_kills import FakeEngine, fake_compute
from tests.one_process import http_service

PROMPTS = ["Once upon a time", "A wolf", "There was once a poor", "The king's daughter"]


def _options(store: Path, work: Path, rows: Sequence[object], **defaults: Any) -> BatchOptions:
    source = work / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BatchOptions(store, "stories", source, work / "out", defaults=RowDefaults(**defaults))


def _read(options: BatchOptions) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(options.output).to_pylist()
    return rows


def test_rows_have_the_text_that_generate_writes_alone(stories_store: Path, tmp_path: Path) -> None:
    sampled = [{"prompt": p, "seed": n, "temperature": 0.8, "top_k": 40} for n, p in enumerate(PROMPTS)]
    options = _options(stories_store, tmp_path, [*sampled, {"prompt": PROMPTS[0]}], max_tokens=12, seed=2)
    report = run_batch(options, compute_here)
    assert (report.rows, report.errors, report.completion_tokens) == (5, 0, 60)
    rows = _read(options)
    for n, prompt in enumerate(PROMPTS):
        sampling = {"seed": n, "temperature": 0.8, "top_k": 40, "max_tokens": 12}
        assert rows[n]["text"] == generate(stories_store, prompt, sampling, EngineOptions()).text
    sampling = {"seed": row_seed(2, 4), "max_tokens": 12}
    assert rows[4]["text"] == generate(stories_store, PROMPTS[0], sampling, EngineOptions()).text


def test_rows_have_the_answers_of_the_http_service(stories_store: Path, tmp_path: Path) -> None:
    """Completions and chats, sampled, stopped and penalised: text, reason and counts."""
    chosen: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "max_tokens": 16, "seed": 1},
        {"prompt": [5, 6, 7, 8], "max_tokens": 9, "seed": 2, "temperature": 0},
        {"prompt": PROMPTS[1], "max_tokens": 40, "seed": 3, "stop": [" the", "."]},
        {"prompt": PROMPTS[2], "seed": 4, "min_tokens": 4, "frequency_penalty": 1.5},
        {"messages": [{"role": "user", "content": PROMPTS[3]}], "max_tokens": 12, "seed": 5},
    ]
    options = _options(stories_store, tmp_path, chosen)
    run_batch(options, compute_here)
    expected = asyncio.run(_over_http(stories_store, chosen))
    names = ("text", "finish_reason", "prompt_tokens", "completion_tokens")
    assert [tuple(row[name] for name in names) for row in _read(options)] == expected


async def _over_http(root: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    loaded = load_engine(ExpertStore.open(root), EngineOptions())
    answers = []
    async with http_service(root, loaded, TextTokenizer.from_folder(root)) as client:
        for row in rows:
            path = "/v1/chat/completions" if "messages" in row else "/v1/completions"
            answer = (await client.post(path, json=row | {"model": "stories"})).raise_for_status().json()
            choice, usage = answer["choices"][0], answer["usage"]
            text = choice["message"]["content"] if "messages" in row else choice["text"]
            counts = (usage["prompt_tokens"], usage["completion_tokens"])
            answers.append((text, choice["finish_reason"], *counts))
    return answers


def test_stop_string_ends_a_row_as_over_http(tiny_store: Path, tmp_path: Path) -> None:
    plain = _options(tiny_store, tmp_path, [{"prompt": "x", "max_tokens": 30, "seed": 1}])
    run_batch(plain, fake_compute)
    text = _read(plain)[0]["text"]
    (tmp_path / "2").mkdir()
    row = {"prompt": "x", "max_tokens": 30, "seed": 1, "stop": text[10:13]}
    stopped = _options(tiny_store, tmp_path / "2", [row])
    run_batch(stopped, fake_compute)
    found = _read(stopped)[0]
    assert (found["text"], found["finish_reason"]) == (text[: text.index(text[10:13])], "stop")
    assert found["completion_tokens"] == len(found["text"]) + 3


def test_engine_s_batch_is_full_across_parts(tiny_store: Path, tmp_path: Path) -> None:
    """Twelve rows may be open, and are at every step but the last three, since no row is longer than three."""
    sizes = []

    class Watched(FakeEngine):
        def step(self) -> list[TokenEvent]:
            sizes.append(len(self.open))
            return super().step()

    rows = [{"prompt": "x", "max_tokens": 1 + n % 3} for n in range(PART_ROWS + 40)]
    options = _options(tiny_store, tmp_path, rows)
    run_batch(options, lambda spec, parts: fake_compute(spec, parts, Watched()))
    assert set(sizes[:-3]) == {12}
    assert [row["index"] for row in _read(options)] == list(range(len(rows)))


def test_failure_of_experts_stops_the_job_and_becomes_no_row_s_error(
    tiny_store: Path, tmp_path: Path
) -> None:
    class Failing(FakeEngine):
        def step(self) -> list[TokenEvent]:
            return [TokenEvent(name, (), "error", EXPERT_FAILED) for name in self.open]

    options = _options(tiny_store, tmp_path, [{"prompt": "x"}])
    with pytest.raises(BatchFailed, match=f"row 0: {EXPERT_FAILED}; run the same command again"):
        run_batch(options, lambda spec, parts: fake_compute(spec, parts, Failing()))
    assert list(options.output.glob("part-*")) == []
    assert run_batch(options, fake_compute).errors == 0


def test_row_that_the_model_cannot_compute_is_its_own_error(tiny_store: Path, tmp_path: Path) -> None:
    class Poisoned(FakeEngine):
        def step(self) -> list[TokenEvent]:
            events = super().step()
            return [
                TokenEvent(e.request_id, (), "error", "non-finite") if e.request_id == "row-1" else e
                for e in events
                if e.request_id != "row-1" or self.open.pop("row-1", None)
            ]

    options = _options(tiny_store, tmp_path, [{"prompt": "x", "max_tokens": 3}] * 3)
    run_batch(options, lambda spec, parts: fake_compute(spec, parts, Poisoned()))
    assert [row["error"] for row in _read(options)] == [None, "Generation failed: non-finite", None]


def test_output_of_another_numerics_class_is_not_mixed(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = _options(tiny_store, tmp_path, [{"prompt": "x", "max_tokens": 1}] * (PART_ROWS + 1))
    run_batch(options, fake_compute)
    (options.output / "_manifest.json").unlink()
    (options.output / Part(1, 0, 1).file).unlink()
    monkeypatch.setattr(batch_kills, "NUMERICS_CLASS", "another")
    with pytest.raises(BatchOutputRefused, match="begun with fake and this machine computes with another"):
        run_batch(options, fake_compute)


def test_complete_output_is_not_computed_again(tiny_store: Path, tmp_path: Path) -> None:
    options = _options(tiny_store, tmp_path, [{"prompt": "x", "max_tokens": 1}, {}])
    report = run_batch(options, fake_compute)

    def refuse(spec: WorkerSpec, parts: Sequence[Part]) -> Any:
        raise AssertionError("computed again")

    assert run_batch(options, refuse) == report


def test_progress_counts_rows_of_earlier_runs(tiny_store: Path, tmp_path: Path) -> None:
    options = _options(tiny_store, tmp_path, [{"prompt": "x", "max_tokens": 1}] * (2 * PART_ROWS))

    def one_part(spec: WorkerSpec, parts: Sequence[Part]) -> Any:
        for event in fake_compute(spec, parts):
            yield event
            if isinstance(event, PartSummary):
                raise BatchFailed("stopped by the test")

    with pytest.raises(BatchFailed):
        run_batch(options, one_part)
    seen: list[tuple[int, int]] = []
    run_batch(options, fake_compute, lambda done, total: seen.append((done, total)))
    assert seen[0] == (PART_ROWS, 2 * PART_ROWS)
    assert seen[-1] == (2 * PART_ROWS, 2 * PART_ROWS)
