"""Images and sound in chats over HTTP: the answers of `transformers`, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts.store import ExpertStore
from gateway.media.decoder import MediaDecoder
from gateway.text.tokenizer import TextTokenizer
from router.loading import LoadedEngine
from router.media.facts import read_media_facts
from router.media.items import Medium
from tests.gateway.media.files import audio_part, image_file, image_part, picture, text_part, tones, wav_file
from tests.omni import Part, Published, request
from tests.one_process import http_service

PNG = image_file(picture(40, 61))
SPOKEN = wav_file(tones(1.3, 16_000), 16_000)
TEXT = "What is this?"


def ask(
    store: Path,
    loaded: LoadedEngine,
    *bodies: dict[str, Any],
    path: str = "/v1/chat/completions",
    **changes: Any,
) -> list[httpx.Response]:
    """One after another."""

    async def run() -> list[httpx.Response]:
        opened = ExpertStore.open(store)
        media = changes.pop("media", read_media_facts(opened.manifest, store))
        opened.close()
        tokenizer = TextTokenizer.from_folder(store)
        async with http_service(store, loaded, tokenizer, media=media, **changes) as client:
            return [await client.post(path, json=body) for body in bodies]

    return asyncio.run(run())


def chat(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": list(parts)}
    return {
        "model": "stories",
        "messages": [message],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    } | fields


def expected(store: Path, omni: LoadedEngine, published: Published, *parts: Part) -> str:
    around = (*b"user: ",), (*b" assistant: ",)
    asked = request(omni, around[0], *parts, around[1])
    return TextTokenizer.from_folder(store).decode(published.greedy(asked))


def decoded(omni: LoadedEngine, content: bytes) -> Medium:
    assert omni.media is not None
    decoder = MediaDecoder(omni.media.facts)
    return decoder.sound(content) if content[:4] == b"RIFF" else decoder.image(content)


@pytest.mark.parametrize(
    "kinds", [("image",), ("audio",), ("image", "audio"), ("image", "text", "image", "audio")]
)
def test_answer_is_that_of_transformers(
    omni_store: Path, omni: LoadedEngine, published: Published, kinds: tuple[str, ...]
) -> None:
    sent = {"image": image_part(PNG), "audio": audio_part(SPOKEN), "text": text_part("and")}
    meant: dict[str, Part] = {"image": decoded(omni, PNG), "audio": decoded(omni, SPOKEN), "text": (*b"and",)}
    body = chat(*(sent[kind] for kind in kinds), text_part(TEXT))
    (response,) = ask(omni_store, omni, body)
    assert response.status_code == 200, response.text
    parts = (*(meant[kind] for kind in kinds), (*TEXT.encode(),))
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == expected(omni_store, omni, published, *parts)
    num_prompt = len(request(omni, (*b"user: ",), *parts, (*b" assistant: ",)).prompt_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
