"""Speech on the command line: options that go together, budgets of what speaks, files that are written."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from experts.budget import BudgetRequest
from experts.store import ExpertStore
from gateway.cli import app
from gateway.errors import FileUnusable, GenerationFailed, OptionInvalid
from gateway.local import generate
from gateway.local.speech import SpeechChoice, choose_speech
from gateway.media.wav_file import decode_wav
from gateway.routers.pool import RouterPool
from gateway.service.gateway_replica import GatewaySpec, build_gateway
from gateway.service.layout import engine_options
from gateway.service.memory import with_speech_budget
from gateway.service.option_values import merge_values
from gateway.service.options import ServiceOptions
from router.loading import EngineOptions
from router.speech.facts import TALKER
from router.speech.wish import SAMPLE_RATE

PROMPT = ("--prompt", "Hello", "--max-tokens", "6", "--temperature", "0", "--seed", "11")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Why, whether it is the parser's or ours."""
    result = run(*arguments)
    assert result.exit_code != 0
    told = result.output if isinstance(result.exception, SystemExit) else str(result.exception)
    return " ".join(told.replace("│", " ").split())


def test_generate_writes_a_file_and_tells_how_long_it_is(omni_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    speech = ("--speech", path, "--voice", "Aiden", "--max-speech-frames", "5")
    result = run("generate", omni_store, *PROMPT, "--dtype", "float32", *speech, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["speech"]["frames"], answer["speech"]["finish_reason"]) == (5, "length")
    samples, rate = decode_wav(path.read_bytes(), 10.0)
    assert rate == SAMPLE_RATE
    assert round(len(samples) / rate, 3) == answer["speech"]["seconds"]


def test_speech_that_fails_loses_no_text(
    omni_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", omni_store, *PROMPT, "--dtype", "float32")
    path = tmp_path / "out.wav"
    expected = run(*asked, "--speech", path, "--max-speech-frames", "2").stdout

    def fail(*_: object) -> None:
        raise GenerationFailed("no sound")

    monkeypatch.setattr(generate, "hear", fail)
    path.unlink()
    result = run(*asked, "--speech", path)
    assert isinstance(result.exception, GenerationFailed)
    assert result.stdout == expected and result.stdout.strip() and not path.exists()


def test_budget_of_what_speaks_changes_no_sample(omni_store: Path, tmp_path: Path) -> None:
    contents = []
    for budget in ((), ("--speech-budget", "17%")):
        path = tmp_path / "out.wav"
        speech = ("--speech", path, "--max-speech-frames", "4")
        result = run("generate", omni_store, *PROMPT, "--dtype", "float32", *speech, *budget)
        assert result.exit_code == 0, result.output
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--prompt-ids", "1,2", "--speech", "a.wav"), "goes with --prompt"),
        (("--prompt", "a", "--voice", "ethan"), "go with --speech"),
        (("--prompt", "a", "--max-speech-frames", "5"), "go with --speech"),
        (("--prompt", "a", "--speech-budget", "1GiB"), "go with --speech"),
        (("--prompt", "a", "--speech", "a.wav", "--voice", "alloy"), "must be one of aiden, chelsie, ethan"),
        (("--prompt", "a", "--speech", "a.wav", "--speech-budget", "much"), "must be a size"),
        (("--prompt", "a", "--speech", "a.wav", "--speech-budget", "1B"), "below one expert"),
        (("--prompt", "a", "--speech", "/no/such/folder/a.wav"), "is no folder to write to"),
    ],
)
def test_speech_that_cannot_be_is_refused_before_the_work(
    omni_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refused("generate", omni_store, *arguments)
    assert not list(tmp_path.iterdir())


def test_speech_takes_the_place_of_no_pipe(omni_store: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or a pipe" in refused("generate", omni_store, *PROMPT, "--speech", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_store_without_a_talker_speaks_nowhere(stories_store: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionInvalid, match="this one has none"):
        choose_speech(ExpertStore.open(stories_store), SpeechChoice())
    assert "this one has none" in refused("chat", stories_store, "--speech", tmp_path / "sounds")


def test_chat_options_of_speech_go_together(omni_store: Path, tmp_path: Path) -> None:
    assert "go with --speech" in refused("chat", omni_store, "--voice", "ethan")
    url = ("chat", "http://127.0.0.1:9", "--speech", tmp_path / "sounds", "--speech-budget", "1GiB")
    assert "goes with a STORE" in refused(*url)
    (tmp_path / "file").write_text("")
    assert isinstance(run("chat", omni_store, "--speech", tmp_path / "file").exception, FileUnusable)


def test_budget_of_a_store_that_does_not_speak_is_refused(tiny_store: Path) -> None:
    spoken = ServiceOptions(tiny_store, "tiny", speech_budget=BudgetRequest(num_bytes=1 << 20))
    with pytest.raises(OptionInvalid, match="speech-budget goes with a store that has a talker"):
        engine_options(spoken, "float32", 1)


def test_budget_counts_the_experts_that_speak(omni_store: Path) -> None:
    store = ExpertStore.open(omni_store)
    keys = store.expert_keys(TALKER)
    total = sum(store.record(key).nbytes for key in keys)
    options = EngineOptions(dtype="float32")

    def resolved(text: str | None) -> int | None:
        request = merge_values({"speech-budget": text}, {}, "").speech_budget
        return with_speech_budget(store, options, request).speech_budget_bytes

    assert resolved(None) is None
    assert resolved("50%") == total // 2
    assert resolved("fit") == resolved("100%") == total
    with pytest.raises(OptionInvalid, match="speech-budget"):
        resolved("1KB")


def test_service_options_reach_engine_and_gateway(omni_store: Path, tmp_path: Path) -> None:
    spoken = ServiceOptions(omni_store, "omni", speech_budget=BudgetRequest(num_bytes=1 << 20))
    engine = engine_options(spoken, "float32", 1)
    assert (engine.has_speech, engine.speech_budget_bytes) == (True, 1 << 20)
    assert not engine_options(ServiceOptions(omni_store, "omni", has_speech=False), "float32", 1).has_speech
    with pytest.raises(OptionInvalid, match="speech, which is off"):
        ServiceOptions(omni_store, "omni", has_speech=False, speech_budget=BudgetRequest(num_bytes=1 << 20))


@pytest.mark.parametrize("has_speech", [True, False])
def test_dry_run_and_config_file_know_speech(omni_store: Path, tmp_path: Path, has_speech: bool) -> None:
    budget = "speech-budget: 50%\n" if has_speech else ""
    (tmp_path / "c.yaml").write_text(f"speech: {str(has_speech).lower()}\n{budget}")
    result = run("serve", omni_store, "--config", tmp_path / "c.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    shown = yaml.safe_load(result.stdout)["options"]
    assert shown["speech"] is has_speech
    assert shown["speech-budget"] == ("50%" if has_speech else None)


@pytest.mark.parametrize("has_speech", [True, False])
def test_gateway_offers_what_its_service_gives(omni_store: Path, has_speech: bool) -> None:
    spec = GatewaySpec(str(omni_store), "omni", 512, 512, 8, "127.0.0.1", 1, has_speech=has_speech)

    async def ask() -> list[str]:
        transport = httpx.ASGITransport(build_gateway(spec, RouterPool({})))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            given: list[str] = (await client.get("/v1/models/omni")).json()["output_modalities"]
            return given

    assert asyncio.run(ask()) == (["text", "audio"] if has_speech else ["text"])
