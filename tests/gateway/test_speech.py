"""Spoken answers over HTTP, with a router that plays a script: what is asked of it, what clients get and what not."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import wave
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gateway.errors import ApiError, RouterBusy, RouterLost
from gateway.http.answer_room import AnswerRoom
from gateway.http.openai_types import ChatRequest, CompletionRequest, Message, ignored_in, read_request
from gateway.http.speech import SpokenReply
from gateway.http.spoken_answers import MOST_KEPT, MOST_KEPT_CHARS, SpokenAnswers
from gateway.http.stream import AnswerText
from gateway.routers.client import RouterClient
from gateway.routers.pool import PoolLimits, RouterPool
from router.request import GenerationRequest, TokenEvent
from router.speech.facts import SpeechFacts
from router.speech.wish import NUM_CODES, SAMPLE_RATE
from tests.gateway.fake_router import (
    EOS,
    MODEL,
    FakeRouter,
    Step,
    app_over,
    http_client,
    script,
    speech_facts,
    stories_tokenizer,
)

CODES = tuple(range(NUM_CODES))
SOUND = bytes(range(256)) * 3
REPLY = stories_tokenizer().encode(" there lived a king.")
TEXT = stories_tokenizer().decode(REPLY)
FACTS = speech_facts()
SPOKEN: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "chelsie", "format": "wav"}}
TURNS: list[dict[str, Any]] = [{"role": "user", "content": "Once upon a time"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": TURNS}


def speech_script(finish_reason: Any = "stop") -> list[Step]:
    """Two frames in three events, as a vocoder that lags behind its codes gives them."""
    return [
        Step(CODES, samples=SOUND[:256]),
        Step(CODES, samples=SOUND[256:512]),
        Step((), finish_reason, samples=SOUND[512:]),
    ]


def router(text: list[Step] | None = None, sound: list[Step] | None = None) -> FakeRouter:
    return FakeRouter(script(REPLY) if text is None else text, speech_script() if sound is None else sound)


def post(
    fake: RouterClient, *bodies: dict[str, Any], facts: SpeechFacts | None = FACTS, **changes: Any
) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with http_client(app_over(fake, speech=facts, **changes)) as client:
            return [await client.post("/v1/chat/completions", json=body) for body in bodies]

    return asyncio.run(run())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refusal(body: dict[str, Any], facts: SpeechFacts | None = FACTS) -> dict[str, Any]:
    (response,) = post(router(), {**CHAT, **body}, facts=facts)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def read_wav(content: bytes) -> tuple[Any, bytes]:
    with wave.open(io.BytesIO(content)) as file:
        return file.getparams(), file.readframes(file.getnframes())


def test_answer_has_its_sound_and_text_where_openai_has_them() -> None:
    (response,) = post(router(), {**CHAT, **SPOKEN})
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] is None
    audio = choice["message"]["audio"]
    assert audio["transcript"] == TEXT
    assert audio["id"].startswith("audio_")
    assert audio["expires_at"] == pytest.approx(answer["created"] + 3600, abs=2)
    params, samples = read_wav(base64.b64decode(audio["data"]))
    assert (params.nchannels, params.sampwidth, params.framerate) == (1, 2, SAMPLE_RATE)
    assert samples == SOUND
    usage = answer["usage"]
    assert usage["completion_tokens_details"] == {"audio_tokens": 2}
    assert usage["completion_tokens"] == len(REPLY) + 1 + 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["sage"]["speech"] == [
        {"frames": 2, "seconds": round(len(SOUND) / 2 / SAMPLE_RATE, 3), "finish_reason": "stop"}
    ]
    assert answer["sage"]["timings"]["first_sound_s"] > 0


def test_router_is_asked_for_the_same_prompt_and_the_reply_in_a_second_request() -> None:
    fake = router()
    post(fake, {**CHAT, **SPOKEN, "seed": 7, "temperature": 0, "sage": {"max_speech_frames": 5}})
    text, speech = fake.requests
    assert text.speech is None and speech.speech is not None
    assert speech.prompt_ids == text.prompt_ids
    assert speech.speech.reply_ids == tuple(REPLY)
    assert speech.speech.voice == "chelsie"
    assert (speech.sampling.seed, speech.sampling.max_tokens) == (7, 5)
    usual = FACTS.defaults
    assert speech.sampling.temperature == usual.temperature, "the text's says nothing of codes"
    assert speech.sampling.top_k == usual.top_k
    assert speech.sampling.repetition_penalty == usual.repetition_penalty
    assert speech.request_id != text.request_id and speech.answer_id == text.answer_id
    assert speech.owner == text.owner


def test_frames_are_never_more_than_the_model_recommends() -> None:
    fake = router()
    post(fake, {**CHAT, **SPOKEN, "sage": {"max_speech_frames": 4096}}, {**CHAT, **SPOKEN})
    assert [asked.sampling.max_tokens for asked in fake.requests[1::2]] == [8, 8]


def test_pcm16_has_no_head_and_a_voice_any_case() -> None:
    fake = router()
    (response,) = post(
        fake, {**CHAT, "modalities": ["audio"], "audio": {"voice": "Chelsie", "format": "pcm16"}}
    )
    assert base64.b64decode(response.json()["choices"][0]["message"]["audio"]["data"]) == SOUND
    wish = fake.requests[1].speech
    assert wish is not None and wish.voice == "chelsie"


def test_without_choices_the_usual_voice_speaks_wav() -> None:
    fake = router()
    (response,) = post(fake, {**CHAT, "modalities": ["text", "audio"]})
    data = base64.b64decode(response.json()["choices"][0]["message"]["audio"]["data"])
    assert read_wav(data)[1] == SOUND
    wish = fake.requests[1].speech
    assert wish is not None and wish.voice == "ethan"


def test_stream_gives_text_then_samples_then_the_end() -> None:
    body = {**CHAT, "modalities": ["text", "audio"], "audio": {"format": "pcm16"}, "stream": True}
    (response,) = post(router(), {**body, "stream_options": {"include_usage": True}})
    *chunks, last, usage = events(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    audio = [delta["audio"] for delta in deltas[1:]]
    assert len({piece.pop("id") for piece in audio[:-1]}) == 1
    kinds = [next(iter(piece)) for piece in audio]
    assert kinds == sorted(kinds, key=["transcript", "data", "expires_at"].index)
    assert "".join(piece.get("transcript", "") for piece in audio) == TEXT
    assert b"".join(base64.b64decode(piece.get("data", "")) for piece in audio) == SOUND
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["usage"]["completion_tokens_details"] == {"audio_tokens": 2}
    assert usage["sage"]["speech"][0]["frames"] == 2


def test_stream_without_usage_tells_in_its_last_chunk_how_much_was_spoken() -> None:
    body = {**CHAT, "modalities": ["text", "audio"], "stream": True}
    (response,) = post(router(sound=speech_script("length")), body)
    last = events(response)[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["sage"]["speech"][0]["finish_reason"] == "length"
    assert last["sage"]["quality"] == "exact"


def test_samples_that_come_together_are_streamed_in_pieces() -> None:
    whole = bytes(250_000)
    sound = [Step(CODES, "stop", samples=whole)]
    (response,) = post(router(sound=sound), {**CHAT, "modalities": ["text", "audio"], "stream": True})
    audio = [chunk["choices"][0]["delta"].get("audio", {}) for chunk in events(response)]
    pieces = [base64.b64decode(piece["data"]) for piece in audio if "data" in piece]
    assert [len(piece) for piece in pieces] == [96_000, 96_000, 58_000]
    assert b"".join(pieces) == whole


@pytest.mark.parametrize(
    ("text", "sound", "expected"), [("stop", "length", "length"), ("length", "stop", "length")]
)
def test_answer_that_was_cut_in_text_or_sound_says_so(text: Any, sound: Any, expected: str) -> None:
    fake = router(script(REPLY, text), speech_script(sound))
    (response,) = post(fake, {**CHAT, **SPOKEN})
    answer = response.json()
    assert answer["choices"][0]["finish_reason"] == expected
    assert answer["sage"]["speech"][0]["finish_reason"] == sound
    wish = fake.requests[1].speech
    assert wish is not None and wish.reply_ids == tuple(REPLY)


def test_each_choice_is_spoken_by_a_request_of_its_own() -> None:
    fake = router()
    (response,) = post(fake, {**CHAT, **SPOKEN, "n": 3, "seed": 5})
    answer = response.json()
    audio = [choice["message"]["audio"] for choice in answer["choices"]]
    assert len({one["id"] for one in audio}) == 3
    spoken = [asked for asked in fake.requests if asked.speech is not None]
    assert sorted(asked.sampling.choice for asked in spoken) == [0, 1, 2]
    assert {asked.sampling.seed for asked in spoken} == {5}
    assert len({asked.request_id for asked in fake.requests}) == 6
    assert answer["usage"]["completion_tokens_details"]["audio_tokens"] == 6
    assert len(answer["sage"]["speech"]) == 3


def test_answer_without_text_is_silent_and_asks_for_no_speech() -> None:
    fake = router(script([]))
    (response,) = post(fake, {**CHAT, **SPOKEN})
    audio = response.json()["choices"][0]["message"]["audio"]
    assert audio["transcript"] == ""
    assert read_wav(base64.b64decode(audio["data"]))[1] == b""
    assert len(fake.requests) == 1


def test_logprobs_stay_with_the_text() -> None:
    fake = router()
    (response,) = post(fake, {**CHAT, **SPOKEN, "logprobs": True})
    assert response.status_code == 200, response.text
    assert fake.requests[0].num_logprobs == 0 and fake.requests[1].num_logprobs is None


def test_stop_string_ends_what_is_spoken_too() -> None:
    fake = router()
    (response,) = post(fake, {**CHAT, **SPOKEN, "stop": " king"})
    assert response.json()["choices"][0]["message"]["audio"]["transcript"] == " there lived a"
    wish = fake.requests[1].speech
    assert wish is not None
    assert stories_tokenizer().decode(wish.reply_ids) == " there lived a"


@pytest.mark.parametrize("end", range(1, len(TEXT)))
def test_spoken_tokens_have_exactly_the_shown_text(end: int) -> None:
    """A stop string at each place of a text, within tokens and between them."""
    tokenizer = stories_tokenizer()
    ids = tokenizer.encode(TEXT + " Ünd „so“ 🎈.")
    whole = tokenizer.decode(ids)
    for stop in (whole[end : end + 3], whole[-end:]):
        silent = {EOS, *tokenizer.special_tokens}
        answer = AnswerText(tokenizer.detokenizer(), silent, [stop])
        reply = SpokenReply(silent, tokenizer.encode_plain)
        for token_id in [*ids, EOS]:
            shown, offsets = answer.take([token_id])
            reply.note(shown, [token_id], offsets)
        reply.end(answer.flush(), answer.num_chars)
        assert reply.text == whole[: whole.find(stop)]
        assert tokenizer.decode(reply.ids) == reply.text


def test_failed_speech_ends_the_request_and_not_silently() -> None:
    failing = [Step(CODES, samples=SOUND[:256]), Step((), "error", "the speech failed")]
    body = {**CHAT, "modalities": ["text", "audio"]}
    whole, streamed = post(router(sound=failing), body, {**body, "stream": True})
    assert whole.status_code == 500
    lines = streamed.text.splitlines()
    assert "error" in json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert "[DONE]" not in lines


@pytest.mark.parametrize("is_mixed", [True, False])
def test_speech_by_experts_of_another_class_is_named(is_mixed: bool) -> None:
    sound = [Step(CODES, samples=SOUND[:256], is_mixed=is_mixed), Step((), "stop")]
    (response,) = post(router(sound=sound), {**CHAT, **SPOKEN})
    assert ("numerics" in response.json()["sage"]) is is_mixed


def test_client_that_leaves_while_it_listens_cancels_the_speech() -> None:
    fake = router(sound=[Step(CODES, samples=SOUND[:256]), Step(hangs=True)])

    async def run() -> None:
        async with http_client(app_over(fake, speech=FACTS)) as client:
            asking = asyncio.ensure_future(client.post("/v1/chat/completions", json={**CHAT, **SPOKEN}))
            await fake.is_hanging.wait()
            asking.cancel()
            await fake.was_cancelled.wait()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert fake.cancelled == [fake.requests[1].request_id]


class SpeechThatIsLost(FakeRouter):
    """Dies with its first speech, after a frame; the next one goes on behind what it is told."""

    is_lost = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if request.speech is not None and not self.is_lost:
            self.is_lost = True
            self.requests.append(request)
            yield TokenEvent(request.request_id, CODES, samples=SOUND[:256])
            raise RouterLost("it died")
        async for event in super().generate(request):
            yield event

    def abandon(self) -> None:
        raise AssertionError("nothing hangs here")


def test_speech_outlives_its_router() -> None:
    other = tuple(reversed(CODES))
    rest = [Step(other, samples=SOUND[256:512]), Step((), "stop", samples=SOUND[512:])]
    fake = SpeechThatIsLost(script(REPLY), rest)
    pool = RouterPool({"router": fake}, PoolLimits(retry_s=0.01))
    (response,) = post(pool, {**CHAT, **SPOKEN})
    data = base64.b64decode(response.json()["choices"][0]["message"]["audio"]["data"])
    assert read_wav(data)[1] == SOUND
    assert response.json()["usage"]["completion_tokens_details"]["audio_tokens"] == 2
    _, lost, resumed = fake.requests
    assert resumed.generated_ids == CODES
    assert (resumed.speech, resumed.sampling) == (lost.speech, lost.sampling)


def test_official_client_reads_both_ways() -> None:
    import openai

    async def run() -> tuple[bytes, str, bytes, str]:
        async with http_client(app_over(router(), speech=FACTS)) as http:
            client = openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="unused", http_client=http, max_retries=0
            )
            ask: Any = client.chat.completions.create
            whole = await ask(model=MODEL, messages=TURNS, **SPOKEN)
            audio = whole.choices[0].message.audio
            again = await ask(model=MODEL, messages=[*TURNS, whole.choices[0].message, *TURNS])
            assert again.choices[0].message.content == TEXT
            data, text = b"", ""
            pcm = {"voice": "ethan", "format": "pcm16"}
            stream = await ask(
                model=MODEL, messages=TURNS, modalities=["text", "audio"], audio=pcm, stream=True
            )
            async for chunk in stream:
                if (piece := chunk.choices[0].delta.audio) is not None:
                    data += base64.b64decode(piece.data or "")
                    text += piece.transcript or ""
            return base64.b64decode(audio.data), audio.transcript, data, text

    wav, transcript, data, text = asyncio.run(run())
    assert read_wav(wav)[1] == data == SOUND
    assert transcript == text == TEXT


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"modalities": ["text", "video"]}, "modalities.1", "text"),
        ({"modalities": []}, "modalities", '"text" and "audio"'),
        ({"modalities": "audio"}, "modalities", '"text" and "audio"'),
        ({"modalities": ["text"], "audio": {"voice": "ethan"}}, "audio", "only allowed with modalities"),
        ({"audio": {"voice": "ethan", "format": "wav"}}, "audio", "only allowed with modalities"),
        ({"sage": {"max_speech_frames": 5}}, "sage.max_speech_frames", "only allowed with modalities"),
        ({**SPOKEN, "sage": {"max_speech_frames": 0}}, "sage.max_speech_frames", "from 1 to 4096"),
        ({**SPOKEN, "sage": {"max_speech_frames": 4097}}, "sage.max_speech_frames", "from 1 to 4096"),
        ({**SPOKEN, "audio": {"voice": "alloy"}}, "audio.voice", "must be one of chelsie, ethan"),
        ({**SPOKEN, "audio": {"voice": {"id": "voice_1"}}}, "audio.voice", "the name of a voice"),
        ({**SPOKEN, "audio": {"format": "mp3"}}, "audio.format", "wav or pcm16"),
        ({**SPOKEN, "audio": ["wav"]}, "audio", "an object with voice and format"),
        ({**SPOKEN, "stream": True}, "audio.format", "must be pcm16"),
        ({**SPOKEN, "n": 9}, "n", "at most 8"),
        ({**SPOKEN, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "spoken"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_by_field(
    fields: dict[str, Any], param: str, reason: str
) -> None:
    error = refusal(fields)
    assert error["param"] == param
    assert reason in error["message"]


def test_prompt_without_a_turn_to_speak_is_refused_before_it_is_answered() -> None:
    fake = router()
    (response,) = post(fake, {**CHAT, **SPOKEN, "messages": [{"role": "user", "content": "a"}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "no turn of the assistant" in response.json()["error"]["message"]
    assert not fake.requests


def test_service_that_does_not_speak_says_so() -> None:
    error = refusal(SPOKEN, facts=None)
    assert error["param"] == "modalities" and error["code"] == "unsupported_parameter"
    (text,) = post(router(), {**CHAT, "modalities": ["text"]}, facts=None)
    assert text.json()["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize(
    ("field", "value"), [("modalities", ["text", "audio"]), ("audio", {"voice": "ethan"})]
)
def test_completions_are_not_spoken(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        read_request(CompletionRequest, {"model": "m", "prompt": "a", field: value})
    assert caught.value.param == field
    with pytest.raises(ApiError):
        read_request(CompletionRequest, {"model": "m", "prompt": "a", "sage": {"max_speech_frames": 5}})


def test_fields_of_audio_without_effect_are_named() -> None:
    body = {**CHAT, "modalities": ["text", "audio"], "audio": {"voice": "ethan", "speed": 2}}
    assert ignored_in(ChatRequest, body) == ["audio.speed"]


def test_models_say_whether_they_speak() -> None:
    async def run(facts: SpeechFacts | None) -> dict[str, Any]:
        async with http_client(app_over(FakeRouter(), speech=facts)) as client:
            card: dict[str, Any] = (await client.get(f"/v1/models/{MODEL}")).json()
            return card

    speaking, silent = asyncio.run(run(FACTS)), asyncio.run(run(None))
    assert (speaking["output_modalities"], speaking["voices"]) == (["text", "audio"], ["chelsie", "ethan"])
    assert silent["output_modalities"] == ["text"] and "voices" not in silent


def test_spoken_answer_stands_in_a_later_turn_by_its_id() -> None:
    fake = router()

    async def run() -> list[httpx.Response]:
        async with http_client(app_over(fake, speech=FACTS)) as client:
            path = "/v1/chat/completions"
            audio = (await client.post(path, json={**CHAT, **SPOKEN})).json()["choices"][0]["message"][
                "audio"
            ]
            turns = [*TURNS, {"role": "assistant", "audio": {"id": audio["id"]}}, *TURNS]
            by_id = await client.post(path, json={**CHAT, "messages": turns})
            turns[1] = {"role": "assistant", "content": TEXT}
            by_text = await client.post(path, json={**CHAT, "messages": turns})
            turns[1] = {"role": "assistant", "content": None, "audio": {"id": "audio_0", "transcript": TEXT}}
            by_transcript = await client.post(path, json={**CHAT, "messages": turns})
            turns[1] = {"role": "assistant", "audio": {"id": "audio_0"}}
            return [by_id, by_text, by_transcript, await client.post(path, json={**CHAT, "messages": turns})]

    *found, unknown = asyncio.run(run())
    assert [response.status_code for response in found] == [200] * 3
    _, _, by_id, by_text, by_transcript = fake.requests
    assert by_id.prompt_ids == by_text.prompt_ids == by_transcript.prompt_ids
    assert unknown.status_code == 400
    assert unknown.json()["error"]["param"] == "messages.1.audio.id"
    assert unknown.json()["error"]["code"] == "audio_not_found"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": "a", "audio": {"id": "audio_0"}},
        {"role": "user", "audio": {"id": "audio_0"}},
        {"role": "assistant", "audio": None},
        {"role": "assistant", "audio": {}},
        {"role": "assistant", "audio": "audio_0"},
        {"role": "assistant", "content": None},
    ],
)
def test_turns_with_neither_content_nor_a_spoken_answer_are_refused(turn: dict[str, Any]) -> None:
    assert refusal({"messages": [*TURNS, turn]})["param"].startswith("messages.1")


def test_kept_texts_are_their_owners_for_a_time_and_bounded() -> None:
    now = 100.0
    kept = SpokenAnswers(lambda: now)
    kept.keep("a", "me", "text", 200.0)
    assert kept.find("a", "me") == "text"
    assert kept.find("a", "you") is None
    now = 201.0
    assert kept.find("a", "me") is None
    for number in range(MOST_KEPT + 1):
        kept.keep(f"n{number}", "me", "t", 300.0)
    assert kept.find("n0", "me") is None and kept.find("n1", "me") == "t"
    kept.keep("long", "me", "x" * MOST_KEPT_CHARS, 300.0)
    assert kept.find("n1", "me") is None and kept.find("long", "me") is not None


def test_content_goes_before_the_text_of_an_id() -> None:
    turn = Message.model_validate({"role": "assistant", "content": "mine", "audio": {"id": "unknown"}})
    (resolved,) = SpokenAnswers().resolved([turn], "me")
    assert resolved.content == "mine"


def test_short_ids_do_not_stand_for_endless_text() -> None:
    kept = SpokenAnswers(lambda: 100.0)
    kept.keep("a", "me", "x" * (MOST_KEPT_CHARS // 4), 200.0)
    turn = Message.model_validate({"role": "assistant", "audio": {"id": "a"}})
    assert len(kept.resolved([turn] * 4, "me")) == 4
    with pytest.raises(ApiError) as caught:
        kept.resolved([turn] * 5, "me")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_room_for_sound_is_bounded_and_given_back() -> None:
    room = AnswerRoom(100)
    with room.taken(150), pytest.raises(RouterBusy), room.taken(1):
        pass
    with room.taken(60, "a"), room.taken(40, "b"), room.taken(0), pytest.raises(RouterBusy), room.taken(1):
        pass
    with room.taken(30, "a"), room.taken(20, "a"), room.taken(50, "b"):
        pass
    with room.taken(30, "a"), pytest.raises(RouterBusy), room.taken(21, "a"):
        pass  # half of it is for others
    assert room.num_bytes == 0


def test_speech_waits_for_a_router_with_room_for_it() -> None:
    """Its text is there already."""

    class Full(FakeRouter):
        num_refusals = 3

        async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
            if request.speech is not None and self.num_refusals:
                self.num_refusals -= 1
                raise RouterBusy(0.001)
            async for event in super().generate(request):
                yield event

    full = Full(script(REPLY), speech_script())
    (response,) = post(full, {**CHAT, **SPOKEN})
    _, samples = read_wav(base64.b64decode(response.json()["choices"][0]["message"]["audio"]["data"]))
    assert samples == SOUND and not full.num_refusals


def test_answers_that_would_take_too_much_memory_are_put_off() -> None:
    fake = FakeRouter([Step(hangs=True)])
    body = {**CHAT, **SPOKEN, "n": 8}

    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with http_client(app_over(fake, speech=speech_facts(4096))) as client:
            path = "/v1/chat/completions"
            asked = [asyncio.ensure_future(client.post(path, json=body)) for _ in range(4)]
            while len(fake.requests) < 32:
                await asyncio.sleep(0)
            refused = await client.post(path, json=body)
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            fake.script, fake.speech_script = script(REPLY), speech_script()
            return refused, await client.post(path, json=body)

    refused, after = asyncio.run(asyncio.wait_for(run(), 30))
    assert refused.status_code == 429 and "Retry-After" in refused.headers
    assert after.status_code == 200, "what was taken was given back"
