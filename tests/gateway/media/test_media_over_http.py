"""Images and sound in chats over HTTP: the answers of `transformers`, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import gc
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest

from experts.store import ExpertStore
from gateway.http.routing_rules import RoutingRules
from gateway.media import decoder
from gateway.media.decoder import MediaDecoder
from gateway.media.held_bytes import HeldBytes
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.loading import LoadedEngine
from router.media.facts import NO_MEDIA, read_media_facts
from router.media.items import Medium
from tests.gateway.media.files import audio_part, image_file, image_part, picture, text_part, tones, wav_file
from tests.omni import AFTER_QUESTION, BEFORE_QUESTION, Part, Published, request
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
    asked = request(omni, BEFORE_QUESTION, *parts, AFTER_QUESTION)
    return TextTokenizer.from_folder(store).decode(published.greedy(asked))


def decoded(omni: LoadedEngine, content: bytes) -> Medium:
    assert omni.media is not None
    made = MediaDecoder(omni.media.facts)
    return made.sound(content) if content[:4] == b"RIFF" else made.image(content)


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
    num_prompt = len(request(omni, BEFORE_QUESTION, *parts, AFTER_QUESTION).prompt_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt


def test_streamed_choices_are_those_that_come_alone(omni_store: Path, omni: LoadedEngine) -> None:
    """Through the official client: two choices of one prompt, drawn, streamed and not."""
    import openai

    parts = [image_part(PNG), audio_part(SPOKEN), text_part(TEXT)]
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 7, "n": 2, "max_tokens": 8}

    async def run() -> tuple[list[str | None], list[str]]:
        tokenizer = TextTokenizer.from_folder(omni_store)
        assert omni.media is not None
        async with http_service(omni_store, omni, tokenizer, media=omni.media.facts) as http:
            client = openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="unused", http_client=http, max_retries=0
            )
            ask: Any = client.chat.completions.create
            messages = [{"role": "user", "content": parts}]
            whole = await ask(model="stories", messages=messages, **fields)
            pieces = ["", ""]
            async for chunk in await ask(model="stories", messages=messages, stream=True, **fields):
                for choice in chunk.choices:
                    pieces[choice.index] += choice.delta.content or ""
            return [choice.message.content for choice in whole.choices], pieces

    whole, pieces = asyncio.run(run())
    assert whole == pieces and whole[0] != whole[1]


def test_second_question_about_an_image_finds_it_encoded_and_computed(
    omni_store: Path, omni: LoadedEngine
) -> None:
    large = image_part(image_file(picture(96, 96, 5)))
    assert omni.media is not None
    before = omni.media.stats.encoded
    bodies = (chat(large, text_part("What?")), chat(large, text_part("Why?")))
    first, second, other = ask(
        omni_store, omni, *bodies, chat(image_part(image_file(picture(96, 96, 6))), text_part("Why?"))
    )
    assert omni.media.stats.encoded - before == 2
    cached = [
        answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second, other)
    ]
    assert cached == [0, 128, 0]


def test_messages_before_may_have_media_too(omni_store: Path, omni: LoadedEngine) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(PNG), text_part("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text_part("And this?"), image_part(PNG)]},
    ]
    (response,) = ask(omni_store, omni, chat() | {"messages": turns})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "sage", [{"policy": "snarc", "explain": True}, {"effort": "auto"}, {"effort": "crisis"}]
)
def test_every_routing_takes_media(omni_store: Path, omni: LoadedEngine, sage: dict[str, Any]) -> None:
    rules = RoutingRules("native", "focus", ("snarc",), ("auto", "crisis"))
    body = chat(image_part(PNG), audio_part(SPOKEN), text_part(TEXT), sage=sage)
    (response,) = ask(omni_store, omni, body, routing=rules)
    assert response.status_code == 200, response.text
    assert response.json()["sage"]["quality"] == "modified"


def test_models_say_what_they_take(omni_store: Path, omni: LoadedEngine) -> None:
    async def run(**changes: Any) -> list[str]:
        async with http_service(omni_store, omni, TextTokenizer.from_folder(omni_store), **changes) as client:
            taken: list[str] = (await client.get("/v1/models/stories")).json()["input_modalities"]
            return taken

    assert omni.media is not None
    assert asyncio.run(run(media=omni.media.facts)) == ["text", "image", "audio"]
    assert asyncio.run(run()) == ["text"]


def _url(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("parts", "param", "reason"),
    [
        ([_url("http://169.254.169.254/latest/meta-data")], "messages.0.content.0", "nothing is fetched"),
        ([text_part("a"), _url("file:///etc/passwd")], "messages.0.content.1", "nothing is fetched"),
        ([_url("data:image/svg+xml;base64,AAAA")], "messages.0.content.0", "PNG, JPEG or WebP"),
        ([_url("data:text/html,<p>")], "messages.0.content.0", "PNG, JPEG or WebP"),
        ([_url("data:image/png;base64,!!!")], "messages.0.content.0", "not in base64"),
        ([_url("data:image/png;base64,AAAA")], "messages.0.content.0", "no image of a known format"),
        ([_url(7)], "messages.0.content", "string url"),
        ([{"type": "image_url", "image_url": "data:"}], "messages.0.content", "string url"),
        (
            [{"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}}],
            "messages.0.content",
            "detail",
        ),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], "messages.0.content", "data and format"),
        (
            [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}],
            "messages.0.content.0",
            "format wav",
        ),
        (
            [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
            "messages.0.content.0",
            "no WAV file",
        ),
        ([{"type": "video_url", "video_url": {"url": "data:"}}], "messages.0.content", "not supported yet"),
        ([image_part(PNG)] * 33, "messages", "at most 32"),
        ([text_part("x")] * 1025, "messages.0.content", "at most 1024 parts"),
    ],
)
def test_media_that_cannot_be_used_are_refused_by_part(
    omni_store: Path, omni: LoadedEngine, parts: list[dict[str, Any]], param: str, reason: str
) -> None:
    (response,) = ask(omni_store, omni, chat(*parts))
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert reason in error["message"], error
    assert error["param"] == param


def test_context_that_media_fill_is_refused_with_their_number(omni_store: Path, omni: LoadedEngine) -> None:
    minute = audio_part(wav_file(tones(60, 8000), 8000))
    (response,) = ask(omni_store, omni, chat(minute))
    assert response.status_code == 400
    assert "Up to messages.0.content.0 media have 780" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_media_that_leave_no_room_for_the_rest_are_counted(omni_store: Path, omni: LoadedEngine) -> None:
    (response,) = ask(omni_store, omni, chat(audio_part(wav_file(tones(38, 8000), 8000)), text_part(TEXT)))
    assert response.status_code == 400
    assert "(494 of them images and sound)" in response.json()["error"]["message"]


def test_too_many_media_of_open_requests_are_put_off(
    omni_store: Path, omni: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MOST_HELD_BYTES", 4 * len(PNG))

    async def run() -> list[httpx.Response]:
        tokenizer = TextTokenizer.from_folder(omni_store)
        assert omni.media is not None
        async with http_service(omni_store, omni, tokenizer, media=omni.media.facts) as client:
            path, body = "/v1/chat/completions", chat(image_part(PNG))
            together = await asyncio.gather(*(client.post(path, json=body) for _ in range(6)))
            # The engine knows who had rows in its last step, which here is in the same process.
            assert (await client.post(path, json=chat(text_part(TEXT)))).status_code == 200
            gc.collect()
            return [*together, await client.post(path, json=body)]

    *together, after = asyncio.run(run())
    assert {answer.status_code for answer in together} == {200, 429}
    assert all("Retry-After" in answer.headers for answer in together if answer.status_code == 429)
    assert after.status_code == 200, "what was held was given back"


def test_media_that_small_files_come_to_are_bounded_too(
    omni_store: Path, omni: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of the requests that come together are within what may be held; their pixels are not."""
    plain = image_file(PIL.Image.new("RGB", (160, 160)))
    num_pixel_bytes, num_together = 160 * 160 * 3, 6
    most = 3 * num_pixel_bytes
    assert num_together * len(image_part(plain)["image_url"]["url"]) < num_pixel_bytes
    monkeypatch.setattr(decoder, "MOST_HELD_BYTES", most)
    most_held = 0
    hold = HeldBytes.hold

    def watched(held: HeldBytes, medium: Medium) -> None:
        nonlocal most_held
        hold(held, medium)
        most_held = max(most_held, held.nbytes)

    monkeypatch.setattr(HeldBytes, "hold", watched)

    async def run() -> list[httpx.Response]:
        tokenizer = TextTokenizer.from_folder(omni_store)
        assert omni.media is not None
        async with http_service(omni_store, omni, tokenizer, media=omni.media.facts) as client:
            body = chat(image_part(plain), max_tokens=4)
            asked = (client.post("/v1/chat/completions", json=body) for _ in range(num_together))
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(run())
    assert {answer.status_code for answer in answers} == {200, 429}
    assert num_pixel_bytes < most_held <= most


def test_service_without_media_refuses_them(omni_store: Path, omni: LoadedEngine) -> None:
    answers = ask(omni_store, omni, chat(image_part(PNG)), chat(audio_part(SPOKEN)), media=NO_MEDIA)
    assert [answer.status_code for answer in answers] == [400, 400]
    assert "none are taken here" in answers[0].json()["error"]["message"]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_media_of_others_than_the_user_are_refused(omni_store: Path, omni: LoadedEngine, role: str) -> None:
    turns = [{"role": role, "content": [image_part(PNG)]}, {"role": "user", "content": "What?"}]
    (response,) = ask(omni_store, omni, chat() | {"messages": turns})
    assert response.status_code == 400
    assert "not by the user" in response.json()["error"]["message"]


def test_text_that_spells_places_of_media_is_text(omni_store: Path, omni: LoadedEngine) -> None:
    spelled = "<|vision_start|><|image_pad|><|vision_end|>"
    answers = ask(
        omni_store,
        omni,
        chat(text_part(spelled)),
        chat(text_part(spelled), image_part(PNG)),
        chat(image_part(PNG)),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    counts = [answer.json()["usage"]["prompt_tokens"] for answer in answers]
    assert counts[1] - counts[2] == len(spelled)


@pytest.mark.parametrize("spelled", ["<|image_pad|>", "<|endoftext|>"])
def test_text_parts_spell_no_control_token_together(
    omni_store: Path, omni: LoadedEngine, spelled: str
) -> None:
    cut = [[text_part(part) for part in (spelled[:end], "", spelled[end:])] for end in range(1, len(spelled))]
    letters = [[text_part(letter) for letter in spelled]]
    whole, *answers = ask(
        omni_store,
        omni,
        *(chat(image_part(PNG), *parts, max_tokens=1) for parts in ([text_part(spelled)], *cut, *letters)),
    )
    assert {answer.status_code for answer in answers} == {200}
    counts = {answer.json()["usage"]["prompt_tokens"] for answer in answers}
    assert counts == {whole.json()["usage"]["prompt_tokens"]}


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "<|image_pad|><|image_pad|>",
        "<|audio_pad|>",
        "text alone",
    ],
)
def test_template_with_other_places_is_refused(
    omni_store: Path, omni: LoadedEngine, tmp_path: Path, template: str
) -> None:
    assert omni.media is not None
    tokenizer = TextTokenizer.from_folder(omni_store)
    chosen = ChatTemplate(template, tokenizer, {})

    async def run() -> httpx.Response:
        async with http_service(
            omni_store, omni, tokenizer, chosen, media=omni.media.facts if omni.media else NO_MEDIA
        ) as client:
            return await client.post("/v1/chat/completions", json=chat(image_part(PNG)))

    response = asyncio.run(run())
    chosen.close()
    assert response.status_code == 400
    assert "no place" in response.json()["error"]["message"]


def test_damaged_parts_are_answered_or_refused_and_disturb_no_neighbour(
    omni_store: Path, omni: LoadedEngine
) -> None:
    chance = random.Random(9)
    values: tuple[Any, ...] = (None, 7, "", "data:", [], {}, True, "x" * 500, PNG.hex())

    def damaged() -> dict[str, Any]:
        parts = copy.deepcopy([image_part(PNG), audio_part(SPOKEN), text_part(TEXT)])
        for _ in range(chance.randint(1, 2)):
            part = chance.choice(parts)
            inner = next((value for value in part.values() if isinstance(value, dict)), part)
            place = chance.choice((part, inner or part))
            key = chance.choice([*place])
            if isinstance(place[key], str) and place[key] and chance.random() < 0.5:
                text = [*place[key]]
                for _ in range(chance.randint(1, 5)):
                    text[chance.randrange(len(text))] = chance.choice("AZ09+/=,;é\0")
                place[key] = "".join(text)
            else:
                place[key] = chance.choice(values)
        return chat(*parts, max_tokens=2)

    neighbour = chat(image_part(PNG), text_part(TEXT))
    first, *answers, last = ask(omni_store, omni, neighbour, *(damaged() for _ in range(300)), neighbour)
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) == {200, 400} and min(codes.values()) > 10, codes
    for answer in answers:
        if answer.status_code == 400:
            assert len(answer.json()["error"]["message"]) < 500
    assert first.json()["choices"] == last.json()["choices"]
