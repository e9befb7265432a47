"""A quantised store as users meet it: on the command line and over HTTP its answers say what they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions
from tests.engines import open_engine
from tests.one_process import http_service

PROMPT = "Once upon a time there was a king who"


@pytest.fixture(scope="module", params=["int8", "int4"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def root(scheme: str, stories_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp(scheme) / "store"
    size = ["--group-size", "64"] if scheme == "int4" else []
    options = ["extract", str(stories_checkpoint), str(store), "--quantize", scheme, *size]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    return store


def test_command_line_proves_shows_and_generates(root: Path, scheme: str, stories_checkpoint: Path) -> None:
    done = CliRunner().invoke(app, ["extract", str(stories_checkpoint), str(root), "--verify"])
    assert done.exit_code == 0 and "quantised as recorded" in done.output
    done = CliRunner().invoke(app, ["inspect", str(root), "--json"])
    assert json.loads(done.output)["quantization"] == {
        "scheme": scheme,
        "group_size": 64 if scheme == "int4" else None,
    }
    done = CliRunner().invoke(app, ["inspect", str(root)])
    assert f"Experts quantised to {scheme}" in done.output
    asked = ["generate", str(root), "--prompt", PROMPT, "--max-tokens", "4", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["quantization"] == {"int8": "int8", "int4": "int4-g64"}[scheme]


def test_http_answers_say_that_they_are_modified(root: Path, scheme: str) -> None:
    async def run() -> None:
        loaded = open_engine(root, EngineOptions())
        async with http_service(root, loaded, TextTokenizer.from_folder(root)) as client:
            body = {"model": "stories", "prompt": PROMPT, "max_tokens": 3}
            answer = (await client.post("/v1/completions", json=body)).json()
            streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
            text = (await client.post("/v1/completions", json=streamed)).text
        loaded.close()
        last = json.loads(text.split("\n\n")[-3].removeprefix("data: "))
        for sage in (answer["sage"], last["sage"]):
            assert sage["quality"] == "modified"
            assert sage["quantization"] == {"int8": "int8", "int4": "int4-g64"}[scheme]

    asyncio.run(run())


@pytest.fixture(scope="module")
def whole(stories_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbone and head quantised, each in its own way; experts as published."""
    store = tmp_path_factory.mktemp("whole") / "store"
    options = ["--quantize-backbone", "int8", "--quantize-head", "int4", "--group-size", "128"]
    done = CliRunner().invoke(app, ["extract", str(stories_checkpoint), str(store), *options])
    assert done.exit_code == 0, done.output
    return store


def test_backbone_and_head_are_chosen_apart_and_every_command_names_them(
    whole: Path, stories_checkpoint: Path, tmp_path: Path
) -> None:
    name = "backbone-int8+head-int4-g128"
    done = CliRunner().invoke(app, ["extract", str(stories_checkpoint), str(whole), "--verify"])
    assert done.exit_code == 0 and "quantised as recorded" in done.output
    done = CliRunner().invoke(app, ["inspect", str(whole)])
    assert "Backbone quantised to int8" in done.output and "Head quantised to int4" in done.output
    assert "Experts quantised" not in done.output
    asked = ["generate", str(whole), "--prompt", PROMPT, "--max-tokens", "4", "--json"]
    answer = json.loads(CliRunner().invoke(app, asked).stdout)
    assert answer["quantization"] == name
    assert answer["sage"] == {"quality": "modified", "quantization": name}
    (tmp_path / "text.txt").write_text("Once upon a time there was a king who had three daughters.")
    done = CliRunner().invoke(app, ["eval", str(whole), str(tmp_path / "text.txt"), "--json"])
    report = json.loads(done.stdout)
    assert report["quantization"] == name
    assert report["backbone_bytes"] == answer["resident_bytes"]["backbone"]
    assert "/backbone-int8/" in report["numerics_class"] and "/head-int4-g128/" in report["numerics_class"]


@pytest.mark.parametrize(
    "options",
    [
        ["--group-size", "64"],
        ["--quantize-head", "int8", "--group-size", "32"],
        ["--quantize-backbone", "int5"],
        ["--quantize", "int8", "--group-size", "32"],
        ["--quantize", "int4", "--group-size", "48"],
    ],
)
def test_group_size_that_means_nothing_is_refused(
    options: list[str], stories_checkpoint: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["extract", str(stories_checkpoint), str(tmp_path / "store"), *options])
    assert done.exit_code == 2
    assert not (tmp_path / "store").exists()
