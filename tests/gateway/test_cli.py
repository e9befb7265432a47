"""The commands that need no service, as a user runs them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.text import Text
from typer.main import get_command

from gateway.cli import app, main

PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def _run(cache: Path, *arguments: str) -> Outcome:
    """The command in this process: a new one would spend seconds on importing PyTorch."""
    stdout, stderr = io.StringIO(), io.StringIO()
    environment = {"SAGE_MOE_CACHE": str(cache), "COLUMNS": "120"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["sage-moe", *arguments]),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def test_command_runs_as_a_process_of_its_own(cache: Path) -> None:
    """By the entry point and by the module, with what it prints on the right streams."""
    environment = os.environ | {"SAGE_MOE_CACHE": str(cache)}
    arguments = ["generate", "stories", "--prompt", PROMPT, "--max-tokens", "8", "--temperature", "0"]
    by_module = [sys.executable, "-m", "gateway.cli", *arguments]
    by_entry_point = [str(Path(sys.executable).with_name("sage-moe")), *arguments]
    outcomes = [
        subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
        for command in (by_module, by_entry_point)
    ]
    expected = _run(cache, *arguments).stdout
    assert [(outcome.stdout, outcome.stderr) for outcome in outcomes] == [(expected, "")] * 2


def _commands(command: Any, name: str = "sage-moe") -> Iterator[tuple[str, Any]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {word}")


def test_help_shows_every_default_that_its_text_names() -> None:
    """Rich takes `[off]` for markup, and shows nothing of it."""
    for name, command in _commands(get_command(app)):
        for parameter in command.params:
            text = parameter.help or ""
            shown = Text.from_markup(text).plain
            assert shown == text.replace("\\[", "["), f"{name}: {parameter.name}"


def _json(result: Outcome) -> dict[str, object]:
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def test_extract_then_inspect_shows_the_whole_process_first(cache: Path, tmp_path: Path) -> None:
    extracted = _run(cache, "extract", "stories", str(tmp_path / "store"))
    assert (extracted.returncode, extracted.stderr) == (0, "")
    assert "384 experts in 6 layers, 31.1 MiB of weights copied" in extracted.stdout
    shown = _run(cache, "inspect", str(tmp_path / "store")).stdout
    assert shown.index("whole process") < shown.index("embeddings")
    assert "FOCUS (k=8, native)" in shown
    again = _run(cache, "extract", "stories", str(tmp_path / "store"))
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr
    assert again.stderr.count("\n") == 1


def test_inspect_json_is_one_object(cache: Path) -> None:
    summary = _json(_run(cache, "inspect", "stories", "--json"))
    assert summary["num_experts"] == 384


def test_missing_store_is_one_line_and_exit_code_1(cache: Path) -> None:
    result = _run(cache, "inspect", "no/such/store")
    assert (result.returncode, result.stdout) == (1, "")
    assert (
        result.stderr
        == "error: no/such/store is no store or checkpoint folder; bundled models: stories, stories-moe\n"
    )


def test_damaged_store_is_one_line(cache: Path, stories_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(stories_store, tmp_path / "store"))
    (store / "manifest.json").write_text("{}")
    result = _run(cache, "generate", str(store), "--prompt", "x")
    assert result.returncode == 1
    assert "format version None; this program reads 1" in result.stderr
    assert result.stderr.count("\n") == 1


def test_generate_by_text_by_ids_and_from_a_store_agree(cache: Path, stories_store: Path) -> None:
    options = ("--max-tokens", "24", "--temperature", "0", "--json")
    by_text = _json(_run(cache, "generate", "stories", "--prompt", PROMPT, *options))
    ids = ",".join(str(token) for token in by_text["prompt_token_ids"])  # type: ignore[attr-defined]
    by_ids = _json(_run(cache, "generate", str(stories_store), "--prompt-ids", ids, *options))
    for field in ("text", "token_ids", "finish_reason", "usage"):
        assert by_text[field] == by_ids[field]
    assert by_text["usage"] == {
        "prompt_tokens": len(by_text["prompt_token_ids"]),  # type: ignore[arg-type]
        "completion_tokens": 24,
        "total_tokens": len(by_text["prompt_token_ids"]) + 24,  # type: ignore[arg-type]
    }
    assert set(by_text) >= {"timings", "resident_bytes"}
    streamed = _run(cache, "generate", "stories", "--prompt", PROMPT, "--stream", *options[:-1])
    assert streamed.stdout == f"{by_text['text']}\n"


def test_same_seed_gives_the_same_sample(cache: Path) -> None:
    runs = [
        _json(_run(cache, "generate", "stories", "--prompt", PROMPT, "--seed", seed, "--json"))["token_ids"]
        for seed in ("3", "3", "4")
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "exactly one of --prompt and --prompt-ids"),
        (("--prompt", "a", "--prompt-ids", "1"), 2, "exactly one of"),
        (("--prompt-ids", "1,x"), 2, "whole numbers"),
        (("--prompt-ids", "1,99999"), 1, "99999"),
        (("--prompt", ""), 1, "prompt"),
        (("--prompt", os.fsdecode(b"ab\xff")), 2, "--prompt is not UTF-8 at character 2"),
        (("--prompt", "a", "--max-tokens", "0"), 2, "max-tokens"),
        (("--prompt", "a", "--max-tokens", "100000"), 1, "at most 2048 fit"),
        (("--prompt", "a", "--temperature", "nan"), 2, "temperature"),
        (("--prompt", "a", "--seed", str(2**64)), 2, "18446744073709551615"),
        (("--prompt", "a", "--snarc", ""), 1, "no preset"),
        (("--prompt", "a", "--dtype", "int8"), 1, "float32 or bfloat16"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    cache: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = _run(cache, "generate", "stories", *arguments)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", [("extract",), ("compare",)])
def test_store_in_the_place_of_a_checkpoint_is_named_as_one(
    cache: Path, stories_store: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    result = _run(cache, *command, str(stories_store), str(tmp_path / "other"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {stories_store} is an expert store; name the checkpoint")


def test_extraction_says_to_what_it_quantised(cache: Path, tmp_path: Path) -> None:
    result = _run(
        cache, "extract", "stories", str(tmp_path / "store"), "--quantize", "int4", "--quantize-head", "int8"
    )
    assert "of weights quantised to int4-g32+head-int8" in result.stdout
