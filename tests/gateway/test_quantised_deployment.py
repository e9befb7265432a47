"""A quantised store whose files are damaged, with a copy, served by an expert actor that gets killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts.budget import FIT
from experts.errors import ExpertError
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from gateway.demo.ports import free_port
from gateway.errors import GenerationFailed
from gateway.local.generate import generate
from gateway.service.launch import ServiceOptions, running_service
from router.loading import EngineOptions

pytestmark = pytest.mark.ray

PROMPT = "Once upon a time there was a king who had three daughters"
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 200}


@pytest.fixture(scope="module")
def whole(stories_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("int4") / "store"
    extract(stories_checkpoint, root, quantised=QuantisedParts(Quantization(scheme="int4", group_size=64)))
    return root


@pytest.fixture(scope="module")
def damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store with zeros for every expert."""
    root = tmp_path_factory.mktemp("damaged") / "store"
    shutil.copytree(whole, root)
    for path in (root / "experts").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    return root


@pytest.fixture(scope="module")
def url(whole: Path, damaged: Path) -> Iterator[str]:
    port = free_port()
    options = ServiceOptions(
        damaged,
        "stories",
        port=port,
        num_actors=1,
        num_cpus=2,
        expert_budgets=(FIT,),
        store_copies=(whole,),
    )
    with running_service(options):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def expected(whole: Path) -> str:
    """The text that the same engine writes in this process, without Ray, HTTP or actors."""
    return generate(whole, PROMPT, SAMPLING, EngineOptions()).text


def _status(url: str) -> Any:
    return httpx.get(f"{url}/sage/status", timeout=30.0).raise_for_status().json()


def _body(**more: Any) -> dict[str, Any]:
    return {"model": "stories", "prompt": PROMPT, **SAMPLING, **more}


def test_actor_reads_the_copy_where_the_first_store_is_damaged(
    url: str, damaged: Path, expected: str
) -> None:
    with pytest.raises((GenerationFailed, ExpertError)):
        generate(damaged, PROMPT, SAMPLING, EngineOptions())
    answer = httpx.post(f"{url}/v1/completions", json=_body(), timeout=60.0).raise_for_status().json()
    assert answer["choices"][0]["text"] == expected
    assert answer["sage"]["quantization"] == "int4-g64"
    status = _status(url)
    assert status["actors"][0]["bytes_read"] > 0
    calls = status["router"]["expert_calls"]
    assert calls["remote_rows"] > 0
    assert {calls["failovers_by_kind"][kind] for kind in ("error", "not finite")} == {0}


@pytest.mark.chaos
def test_quantised_actor_killed_in_mid_answer_changes_no_token(url: str, expected: str) -> None:
    victim = _status(url)["actors"][0]["pid"]
    pieces: list[str] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=_body(stream=True), timeout=60.0) as response:
        for line in response.raise_for_status().iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                pieces += [choice["text"] for choice in event["choices"]]
                if len(pieces) == 5:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
    assert "".join(pieces) == expected
    assert _status(url)["router"]["expert_calls"]["failovers"] > 0
