"""`sage-moe eval`, and the options for studying routing, as users run them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest

from gateway.cli import main
from gateway.evaluation.report import WINDOW_SCHEMA
from router.trace_file import TraceFile
from router.trace_reader import read_trace

PNG = b"\x89PNG\r\n"
WORDS = "There was once a miller who had three sons, and the youngest of them was a very good boy. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "miller.txt"
    path.write_text(WORDS * 3)
    return path


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with mock.patch.object(sys, "argv", ["sage-moe", *arguments]):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_eval_prints_json_and_leaves_its_files(
    tiny_store: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("out.parquet", "trace.parquet", "page.png")}
    code, out, err = _run(
        capsys, "eval", str(tiny_store), str(text), "--context", "24", "--max-tokens", "100", "--json",
        "--budget", "50%", "--parquet", str(files["out.parquet"]), "--trace", str(files["trace.parquet"]),
        "--plot", str(files["page.png"]),
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["tokens"] == 99 and report["stride"] == 12
    assert report["budget_bytes"] == report["expert_bytes"] // 2
    assert "99 of 99 tokens" in err
    windows = pq.read_table(files["out.parquet"])
    assert windows.schema.equals(WINDOW_SCHEMA)
    assert sum(windows["tokens"].to_pylist()) == 99
    assert sum(windows["nll"].to_pylist()) / 99 == pytest.approx(report["nll"])
    assert read_trace(files["trace.parquet"]).facts.policy == "native"
    assert files["page.png"].read_bytes().startswith(PNG)


def test_trace_that_fails_at_its_end_loses_no_result(
    tiny_store: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: TraceFile) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceFile, "finish", refuse)
    files = [tmp_path / name for name in ("out.parquet", "trace.parquet", "page.png")]
    code, out, err = _run(
        capsys, "eval", str(tiny_store), str(text), "--max-tokens", "60", "--json",
        "--parquet", str(files[0]), "--trace", str(files[1]), "--plot", str(files[2]),
    )  # fmt: skip
    assert code == 1
    assert json.loads(out)["tokens"] == 59
    assert err.rstrip().endswith("trace.parquet cannot be written: No space left on device")
    assert [path.exists() for path in files] == [True, False, False]


def test_trace_that_fails_at_its_end_loses_no_answer(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: TraceFile) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceFile, "finish", refuse)
    code, out, err = _run(
        capsys, "generate", str(tiny_store), "--prompt", "Once", "--max-tokens", "6", "--json",
        "--trace", str(tmp_path / "trace.parquet"),
    )  # fmt: skip
    assert code == 1
    assert len(json.loads(out)["token_ids"]) == 6
    assert err.rstrip().endswith("trace.parquet cannot be written: No space left on device")
    assert not list(tmp_path.iterdir())


def test_eval_draws_without_a_trace_of_the_user_s(
    tiny_store: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.png"
    code, out, err = _run(
        capsys,
        "eval",
        str(tiny_store),
        str(text),
        "--max-tokens",
        "60",
        "--plot",
        str(page),
        "--mask-experts",
        "0:0-3",
    )
    assert code == 0, err
    assert "masked at FOCUS" in out and "miller.txt" in out
    assert page.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "random"), "--policy must be one of native, snarc, not 'random'"),
        (("--effort", "much"), "--effort must be one of wake, focus, crisis, auto"),
        (("--stride", "256"), "--stride must be from 1 to 255"),
        (("--budget", "1B"), "budget"),
        (("--budget", "much"), "budget must be a size"),
        (("--mask-experts", "0:0-7"), "0 experts remain"),
        (("--replay-routing", "none.parquet"), "none.parquet: is no readable trace"),
        (("--trace", "no/such/folder.parquet"), "cannot be written"),
        (("--plot", "."), "is a folder"),
        (("--dtype", "float8"), "choose float32 or bfloat16"),
    ],
)
def test_what_cannot_be_is_one_line(
    tiny_store: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = _run(capsys, "eval", str(tiny_store), str(text), *arguments)
    error = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1 and out == ""
    assert len(error) == 1 and message in error[0]


def test_plots_without_matplotlib_are_refused_before_the_work(
    tiny_store: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        code, _, err = _run(capsys, "eval", str(tiny_store), str(text), "--plot", str(tmp_path / "page.png"))
    assert code == 1 and "pip install 'sage-moe[plot]'" in err


def test_generate_traces_replays_and_masks(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = str(tmp_path / "trace.parquet")
    command = (
        "generate",
        str(tiny_store),
        "--prompt",
        "Once",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--json",
    )
    native = json.loads(_run(capsys, *command, "--trace", trace)[1])
    replayed = json.loads(_run(capsys, *command, "--replay-routing", trace)[1])
    masked = json.loads(_run(capsys, *command, "--mask-experts", "0:0-5,2:1")[1])
    assert [answer["policy"] for answer in (native, replayed, masked)] == ["native", "replayed", "masked"]
    assert [answer["sage"]["quality"] for answer in (native, replayed, masked)] == [
        "exact",
        "modified",
        "modified",
    ]
    assert replayed["token_ids"] == native["token_ids"] != masked["token_ids"]
    assert len(read_trace(Path(trace)).positions_N) == (4 + 5) * 2
