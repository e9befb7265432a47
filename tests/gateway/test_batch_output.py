"""The output folder: one driver, one job, nothing of others, nothing half written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gateway.batch import output as batch_output
from gateway.batch.output import OutputFolder, ResultRow, claimed, write_whole
from gateway.batch.plan import Part
from gateway.errors import BatchFailed, BatchOutputRefused

PARTS = (Part(0, 0, 2), Part(1, 2, 1))
JOB: dict[str, Any] = {"input": {"sha256": "0"}, "max_tokens": 4}
ROWS = [ResultRow(0, "a", "text", "stop", 3, 2), ResultRow(1, None, error="bad")]


def _refusal(root: Path, job: dict[str, Any] = JOB) -> str:
    with pytest.raises(BatchOutputRefused) as caught, claimed(root, job, PARTS):
        pass
    return str(caught.value)


def test_part_can_be_read_by_any_reader_and_says_what_it_holds(tmp_path: Path) -> None:
    with claimed(tmp_path / "out", JOB, PARTS) as folder:
        summary = folder.write_part(PARTS[0], ROWS, "class")
        assert folder.read_summary(PARTS[0]) == summary
        folder.write_part(PARTS[1], [ResultRow(2, "c", "", "length", 1, 1)], "class")
        totals = folder.write_manifest(JOB, PARTS)
    assert (summary.num_errors, summary.prompt_tokens, summary.completion_tokens) == (1, 3, 2)
    assert totals == {"rows": 3, "errors": 1, "prompt_tokens": 4, "completion_tokens": 3}
    table = pq.read_table(tmp_path / "out")
    names = ["id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error", "index"]
    assert table.column_names == names
    assert table.to_pylist()[1] == dict.fromkeys(names) | {"error": "bad", "index": 1}
    assert OutputFolder(tmp_path / "out").read_totals() == totals


def test_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "no batch's output" in _refusal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_job_is_refused_by_what_it_differs_in(tmp_path: Path) -> None:
    with claimed(tmp_path, JOB, PARTS):
        pass
    assert "another input" in _refusal(tmp_path, JOB | {"input": {"sha256": "1"}})
    assert "max_tokens was 4 and is 5 now" in _refusal(tmp_path, JOB | {"max_tokens": 5})
    (tmp_path / "_job.json").write_text("[")
    assert "_job.json: is damaged" in _refusal(tmp_path)


def test_second_driver_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with claimed(tmp_path, JOB, PARTS):
        assert "another run is writing to it" in _refusal(tmp_path)
    with claimed(tmp_path, JOB, PARTS):
        pass


def test_part_that_no_plan_has_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, JOB, PARTS):
        pass
    (tmp_path / "part-000007.parquet").write_bytes(b"")
    assert "is not of this job" in _refusal(tmp_path)


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    with claimed(tmp_path, JOB, PARTS):
        pass
    (tmp_path / ".part-000000.parquet.0123abcd.tmp").write_bytes(b"half")
    with claimed(tmp_path, JOB, PARTS) as folder:
        assert folder.part_files() == []
    assert [path.name for path in tmp_path.iterdir()] == ["_job.json"]


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", None])
def test_damaged_or_exchanged_part_is_refused_at_the_end(tmp_path: Path, content: bytes | None) -> None:
    with claimed(tmp_path, JOB, PARTS) as folder:
        folder.write_part(PARTS[0], ROWS, "class")
        other = (tmp_path / PARTS[0].file).read_bytes()
        (tmp_path / PARTS[1].file).write_bytes(other if content is None else content)
        with pytest.raises(BatchOutputRefused, match=r"part-000001\.parquet: is not as it was written"):
            folder.write_manifest(JOB, PARTS)
        assert not folder.is_complete


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(batch_output.os, "fsync", fail)
    with pytest.raises(BatchFailed, match="cannot be written: No space left"):
        write_whole(tmp_path, "part-000000.parquet", b"x")
    assert list(tmp_path.iterdir()) == []
