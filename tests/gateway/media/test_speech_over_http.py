"""Spoken answers over HTTP, the whole way with a small Qwen3-Omni: codes of `transformers`, and the same samples from
everywhere."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gateway.chat.local import open_store
from gateway.chat.loop import Conversation, run_chat
from gateway.chat.sound_folder import SoundFolder
from gateway.local.generate import Generation, generate
from gateway.local.media_prompt import MediaFiles
from gateway.local.speech import SpeechChoice
from gateway.media.wav_file import decode_wav
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest
from router.speech.facts import SpeechFacts
from router.speech.wish import NUM_CODES, SAMPLE_RATE
from tests.engines import open_engine
from tests.gateway.media.files import audio_part, image_file, image_part, picture, text_part, tones, wav_file
from tests.gateway.test_chat_command import ScriptedTerminal
from tests.one_process import http_service
from tests.speech import PublishedSpeech, speech_facts

NUM_FRAMES = 9
PNG, HEARD = image_file(picture(40, 61)), wav_file(tones(1.3, 16_000), 16_000)
SPOKEN: dict[str, Any] = {
    "model": "stories",
    "modalities": ["text", "audio"],
    "audio": {"voice": "aiden", "format": "pcm16"},
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "seed": 11,
    "sage": {"max_speech_frames": NUM_FRAMES},
}
QUESTION = "Who is there?"


@pytest.fixture(scope="module")
def speaking(omni_store: Path) -> Iterator[LoadedEngine]:
    """An engine that sees, hears and speaks."""
    loaded = open_engine(omni_store, EngineOptions(dtype="float32", has_media=True, has_speech=True))
    yield loaded
    loaded.close()


def greedy(facts: SpeechFacts) -> SpeechFacts:
    """The same, codes not drawn."""
    return replace(facts, defaults=replace(facts.defaults, temperature=0.0))


def body(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    turn = {"role": "user", "content": list(parts or [text_part(QUESTION)])}
    return {**SPOKEN, "messages": [turn], **fields}


def ask(
    store: Path,
    loaded: LoadedEngine,
    *bodies: dict[str, Any],
    is_greedy: bool = False,
    is_together: bool = False,
) -> list[httpx.Response]:
    assert loaded.media is not None
    media, speech = loaded.media.facts, speech_facts(loaded)

    async def run() -> list[httpx.Response]:
        tokenizer = TextTokenizer.from_folder(store)
        facts = greedy(speech) if is_greedy else speech
        async with http_service(store, loaded, tokenizer, media=media, speech=facts) as client:
            asked = [client.post("/v1/chat/completions", json=one) for one in bodies]
            answers = await asyncio.gather(*asked) if is_together else [await one for one in asked]
            return list(answers)

    answers = asyncio.run(run())
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    return answers


def audio(response: httpx.Response, choice: int = 0) -> tuple[str, bytes]:
    found = response.json()["choices"][choice]["message"]["audio"]
    return found["transcript"], base64.b64decode(found["data"])


def heard(samples: bytes) -> NDArray[np.float32]:
    return (np.frombuffer(samples, "<i2") / 32768).astype(np.float32)


class Recorded:
    """What routers were asked, by a way through `RouterService.submit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from router.service import RouterService

        self.requests: list[GenerationRequest] = []
        submit = RouterService.submit

        def recorded(service: RouterService, gateway: str, request: GenerationRequest) -> None:
            self.requests.append(request)
            submit(service, gateway, request)

        monkeypatch.setattr(RouterService, "submit", recorded)


@pytest.mark.parametrize("kinds", [("text",), ("image", "text"), ("audio", "text")])
def test_speech_is_that_of_transformers(
    omni_store: Path,
    speaking: LoadedEngine,
    published_speech: PublishedSpeech,
    monkeypatch: pytest.MonkeyPatch,
    kinds: tuple[str, ...],
) -> None:
    parts = {"image": image_part(PNG), "audio": audio_part(HEARD), "text": text_part("Hello")}
    recorded = Recorded(monkeypatch)
    (response,) = ask(omni_store, speaking, body(*(parts[kind] for kind in kinds)), is_greedy=True)
    _, speech = recorded.requests
    assert speech.speech is not None
    # No token of these replies is a control token, of which the published program would speak some and we none.
    reply, frames = published_speech.greedy(speech, len(speech.speech.reply_ids))
    assert reply == speech.speech.reply_ids
    codes = torch.tensor(frames).T[None]
    with torch.no_grad():
        expected = published_speech.model.code2wav(codes)[0, 0].numpy()
    transcript, samples = audio(response)
    assert transcript == TextTokenizer.from_folder(omni_store).decode(reply)
    assert len(samples) == 2 * len(expected)
    assert np.abs(heard(samples) - expected).max() < 2e-4
    assert response.json()["usage"]["completion_tokens_details"]["audio_tokens"] == len(frames) == NUM_FRAMES


def test_speech_is_the_same_streamed_whole_alone_and_beside_others(
    omni_store: Path, speaking: LoadedEngine
) -> None:
    others = [body(text_part(f"Question {number}"), image_part(PNG), seed=number) for number in range(3)]
    alone, repeated, streamed = ask(omni_store, speaking, body(), body(), body(stream=True))
    together = ask(omni_store, speaking, *others, body(), is_together=True)
    transcript, samples = audio(alone)
    assert len(samples) > 2 * 1920
    assert audio(repeated) == audio(together[-1]) == (transcript, samples)
    assert _joined(streamed) == (transcript, samples)


def _joined(response: httpx.Response) -> tuple[str, bytes]:
    text, data = "", b""
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                piece = choice["delta"].get("audio", {})
                text += piece.get("transcript", "")
                data += base64.b64decode(piece.get("data", ""))
    return text, data


def test_voices_seeds_and_choices_sound_differently(omni_store: Path, speaking: LoadedEngine) -> None:
    chelsie = {**SPOKEN["audio"], "voice": "chelsie"}
    usual, other_voice, other_seed, two = ask(
        omni_store, speaking, body(), body(audio=chelsie), body(seed=12), body(n=2)
    )
    sounds = [audio(answer)[1] for answer in (usual, other_voice, other_seed)]
    assert len(set(sounds)) == 3
    assert audio(two, 0)[1] == sounds[0] != audio(two, 1)[1]


def test_spoken_turn_is_found_again_by_its_id(omni_store: Path, speaking: LoadedEngine) -> None:
    """The whole way: text and sound of a second turn are those of a conversation in text."""

    async def run() -> tuple[httpx.Response, httpx.Response]:
        facts = speech_facts(speaking)
        tokenizer = TextTokenizer.from_folder(omni_store)
        async with http_service(omni_store, speaking, tokenizer, speech=facts) as client:
            path = "/v1/chat/completions"
            first = (await client.post(path, json=body())).json()["choices"][0]["message"]["audio"]
            turns = body()["messages"]
            again = {"role": "user", "content": "And now?"}
            spoken = [*turns, {"role": "assistant", "audio": {"id": first["id"]}}, again]
            written = [*turns, {"role": "assistant", "content": first["transcript"]}, again]
            return (
                await client.post(path, json=body(messages=spoken)),
                await client.post(path, json=body(messages=written)),
            )

    by_id, by_text = asyncio.run(run())
    assert by_id.status_code == 200, by_id.text
    assert audio(by_id) == audio(by_text)


def _local(store: Path, path: Path, choice: SpeechChoice, **options: Any) -> Generation:
    return generate(
        store,
        QUESTION,
        {"max_tokens": 12, "temperature": 0.0, "seed": 11},
        EngineOptions(dtype="float32", kv_budget_bytes=1 << 24, **options),
        files=MediaFiles((path,)),
        speech=choice,
    )


def test_generate_speaks_what_the_service_speaks(
    omni_store: Path, speaking: LoadedEngine, tmp_path: Path
) -> None:
    (tmp_path / "seen.png").write_bytes(PNG)
    asked = body(image_part(PNG), text_part(QUESTION), ignore_eos=False)
    (response,) = ask(omni_store, speaking, asked)
    answer = _local(omni_store, tmp_path / "seen.png", SpeechChoice("Aiden", NUM_FRAMES))
    assert answer.spoken is not None
    assert (answer.text, answer.spoken.samples) == audio(response)
    told = answer.as_json()["speech"]
    assert told.items() >= response.json()["sage"]["speech"][0].items()
    assert told["frames"] > 2 and told["first_sound_s"] > 0
    answer.spoken.save(tmp_path / "out.wav")
    samples, rate = decode_wav((tmp_path / "out.wav").read_bytes(), 10.0)
    assert rate == SAMPLE_RATE and len(samples) == len(answer.spoken.samples) // 2


def test_chat_with_a_store_speaks_what_the_service_speaks(
    omni_store: Path, speaking: LoadedEngine, tmp_path: Path
) -> None:
    (response,) = ask(omni_store, speaking, body())
    sampling = {"max_tokens": 12, "temperature": 0.0, "seed": 11, "stop_token_ids": ()}
    options = EngineOptions(dtype="float32", has_media=True, kv_budget_bytes=1 << 24)
    choice = SpeechChoice("aiden", NUM_FRAMES)
    with open_store(omni_store, "omni", sampling, options, speech=choice) as backend:
        terminal = ScriptedTerminal(QUESTION)
        run_chat(backend, terminal, Conversation(), sounds=SoundFolder(tmp_path))
    transcript, samples = audio(response)
    assert "".join(terminal.shown) == transcript + "\n"
    assert (tmp_path / "0001.wav").read_bytes().endswith(samples)
    assert len((tmp_path / "0001.wav").read_bytes()) == 44 + len(samples)


def test_codes_are_whole_frames(omni_store: Path, speaking: LoadedEngine) -> None:
    (response,) = ask(omni_store, speaking, body())
    told = response.json()["sage"]["speech"][0]
    assert told == {
        "frames": NUM_FRAMES,
        "seconds": round((1920 * NUM_FRAMES - 555) / SAMPLE_RATE, 3),
        "finish_reason": "length",
    }
    assert NUM_CODES == 16
