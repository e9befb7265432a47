"""Images and sound over a real Ray: two routers, an expert actor, and routers that die in the middle of an answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo.ports import free_port
from gateway.local.generate import Generation, generate
from gateway.local.media_prompt import MediaFiles
from gateway.service.launch import ServiceOptions, running_service
from router.loading import EngineOptions
from tests.gateway.media.files import audio_part, image_file, image_part, picture, text_part, tones, wav_file

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

IMAGE, SOUND = image_file(picture(90, 70)), wav_file(tones(2.2, 24_000, 2), 24_000)
TEXT = "What is this?"
NUM_TOKENS = 300
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def url(omni_store: Path) -> Iterator[str]:
    options = ServiceOptions(
        omni_store,
        "omni",
        port=free_port(),
        num_actors=1,
        num_routers=2,
        num_cpus=2,
        resume_timeout_s=120,
        kv_budget_bytes=64 << 20,
    )
    with running_service(options) as url:
        yield url


@pytest.fixture(scope="module")
def expected(omni_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """The answer of one process, without Ray, HTTP or actors."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "image.png").write_bytes(IMAGE)
    (folder / "sound.wav").write_bytes(SOUND)
    return generate(
        omni_store,
        TEXT,
        {"max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS, "temperature": 0.0},
        EngineOptions(kv_budget_bytes=64 << 20),
        files=MediaFiles((folder / "image.png",), (folder / "sound.wav",)),
    )


def _body(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [image_part(IMAGE), audio_part(SOUND), text_part(TEXT)]}
    length = {"max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS}
    return {"model": "omni", "messages": [message], "temperature": 0, **length, **more}


def _status(url: str) -> Any:
    return httpx.get(f"{url}/sage/status", timeout=30.0).raise_for_status().json()


def test_answers_are_those_of_one_process(url: str, expected: Generation) -> None:
    for _ in range(2):  # one for each router
        response = httpx.post(f"{url}/v1/chat/completions", json=_body(), timeout=TIMEOUT_S)
        answer = response.raise_for_status().json()
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    status = _status(url)
    assert all(row["media_bytes"] > 0 for row in status["memory"]["processes"][:2])
    assert sum(router["media"]["encoded"] for router in status["routers"]) >= 2


def test_router_that_dies_in_mid_answer_changes_no_token(url: str, expected: Generation) -> None:
    """Neither router is left; the one that goes on is new, and encodes the media again."""
    victims = [router["pid"] for router in _status(url)["routers"]]
    text, is_killed = "", False
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=_body(stream=True), timeout=TIMEOUT_S
    ) as response:
        for line in response.raise_for_status().iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if len(text) > 20 and not is_killed:
                is_killed = True
                for pid in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
    assert is_killed
    assert text == expected.text
    status = _status(url)
    assert not {router["pid"] for router in status["routers"]} & set(victims)
    assert any(router["media"]["encoded"] == 2 for router in status["routers"])
