"""Spoken answers over a real Ray: two routers, an expert actor, and routers that die while they speak."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo.ports import free_port
from gateway.local.generate import Generation, generate
from gateway.local.media_prompt import MediaFiles
from gateway.local.speech import SpeechChoice
from gateway.service.launch import ServiceOptions, running_service
from router.loading import EngineOptions
from tests.gateway.media.files import image_file, image_part, picture, text_part

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

IMAGE = image_file(picture(50, 40))
TEXT = "What is this?"
NUM_TOKENS, NUM_FRAMES, SEED = 24, 400, 7
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
    seen = tmp_path_factory.mktemp("files") / "image.png"
    seen.write_bytes(IMAGE)
    return generate(
        omni_store,
        TEXT,
        {"max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS, "temperature": 0.0, "seed": SEED},
        EngineOptions(kv_budget_bytes=64 << 20),
        files=MediaFiles((seen,)),
        speech=SpeechChoice("chelsie", NUM_FRAMES),
    )


def _body(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": [image_part(IMAGE), text_part(TEXT)]}
    return {
        "model": "omni",
        "messages": [message],
        "modalities": ["text", "audio"],
        "audio": {"voice": "chelsie", "format": "pcm16"},
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "min_tokens": NUM_TOKENS,
        "seed": SEED,
        "sage": {"max_speech_frames": NUM_FRAMES},
        **more,
    }


def _status(url: str) -> Any:
    return httpx.get(f"{url}/sage/status", timeout=30.0).raise_for_status().json()


def _spoken(expected: Generation) -> bytes:
    assert expected.spoken is not None
    return expected.spoken.samples


def test_answers_sound_as_those_of_one_process(url: str, expected: Generation) -> None:
    answers: list[bytes] = []

    def ask() -> None:
        response = httpx.post(f"{url}/v1/chat/completions", json=_body(), timeout=TIMEOUT_S)
        audio = response.raise_for_status().json()["choices"][0]["message"]["audio"]
        answers.append(base64.b64decode(audio["data"]))

    askers = [threading.Thread(target=ask) for _ in range(4)]  # both routers, and several in one
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert answers == [_spoken(expected)] * 4
    assert len(set(_spoken(expected))) > 100
    status = _status(url)
    assert all(row["speech_bytes"] > 0 for row in status["memory"]["processes"][:2])
    told = [router["speech"] for router in status["routers"]]
    assert sum(speech["samples"] for speech in told) == 4 * len(_spoken(expected)) // 2
    assert not any(speech["running"] + speech["waiting"] + speech["failed"] for speech in told)


def test_routers_that_die_while_they_speak_change_no_sample(url: str, expected: Generation) -> None:
    """Neither router is left; the one that goes on is new, and has heard nothing of it."""
    victims = [router["pid"] for router in _status(url)["routers"]]
    samples, is_killed = b"", False
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=_body(stream=True), timeout=TIMEOUT_S
    ) as response:
        for line in response.raise_for_status().iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                samples += base64.b64decode((choice["delta"].get("audio") or {}).get("data") or "")
            if samples and not is_killed:
                is_killed = True
                for pid in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
    assert is_killed
    assert samples == _spoken(expected)
    status = _status(url)
    assert not {router["pid"] for router in status["routers"]} & set(victims)
    assert 0 < sum(router["speech"]["frames"] for router in status["routers"]) < NUM_FRAMES
