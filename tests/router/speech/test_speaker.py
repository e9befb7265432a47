"""The speaker's books: who gets a frame, who waits, what is refused, and what one failure ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experts.errors import ExpertError
from experts.worker import ExpertWorker
from router.errors import ConfigUnsupported, PromptInvalid, RequestTooLong, WeightMismatch
from router.loading import LoadedEngine
from router.request import SamplingParams
from router.speech.inputs import TEXT_ROWS, check_speech
from router.speech.opening import SpeakerOptions, open_speaker
from router.speech.projections import Projection
from router.speech.speaker import EXPERT_FAILED, NOT_FINITE, SpeakerLimits
from router.speech.wish import NUM_CODES, SpeechWish
from tests.engines import prove_once
from tests.omni import TURN_END, image
from tests.speech import GREEDY, Turn, asked, new_speaker, resumed, speak, speech_facts, speech_request

QUESTION: tuple[Turn, ...] = (asked(tuple(b"Who are you?")),)


def test_speeches_wait_for_their_turn_and_all_get_one(omni: LoadedEngine) -> None:
    short = replace(GREEDY, max_tokens=3)
    requests = [speech_request(omni, *QUESTION, name=f"s{n}", sampling=short) for n in range(5)]
    speaker = new_speaker(omni, limits=SpeakerLimits(most_running=2))
    for request in requests:
        speaker.add(request)
    assert speaker.num_waiting == 5
    ended = []
    while speaker.has_work:
        events = speaker.step()
        assert speaker.num_running <= 2
        ended += [event.request_id for event in events if event.finish_reason]
    assert ended == [request.request_id for request in requests]
    assert speaker.stats.frames == 15


def test_running_speech_gets_a_frame_in_each_step_beside_a_long_prompt(omni: LoadedEngine) -> None:
    speaker = new_speaker(omni, limits=SpeakerLimits(prompt_rows=8))
    speaker.add(speech_request(omni, *QUESTION, name="first"))
    while not speaker.step():
        pass
    speaker.add(speech_request(omni, asked(tuple(range(32, 200))), name="second"))
    for _ in range(12):
        assert [event.request_id for event in speaker.step()] == ["first"]


def test_long_conversation_is_computed_piece_by_piece_and_not_when_it_comes(
    omni: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who speaks already would wait for it."""
    speaker = new_speaker(omni, limits=SpeakerLimits(prompt_rows=8))
    most: list[int] = []
    project = Projection.__call__

    def counted(projection: Projection, rows_RD: torch.Tensor) -> torch.Tensor:
        most.append(len(rows_RD))
        return project(projection, rows_RD)

    monkeypatch.setattr(Projection, "__call__", counted)
    reply = tuple(range(32, 132))
    speaker.add(speech_request(omni, asked(tuple(range(32, 200))), reply=reply))
    assert not most
    while speaker.has_work:
        speaker.step()
    assert max(most) <= TEXT_ROWS
    assert sum(most) < 168 + len(reply) + 20


def test_removed_speech_gets_nothing_more_and_leaves_its_room(omni: LoadedEngine) -> None:
    speaker = new_speaker(omni, limits=SpeakerLimits(most_running=1))
    for name in ("first", "second"):
        speaker.add(speech_request(omni, *QUESTION, name=name))
    speaker.step()
    assert speaker.remove("first")
    assert not speaker.remove("first")
    assert {event.request_id for event in speaker.step()} == {"second"}
    assert speaker.remove("second")
    assert speaker.allocator.num_used == 0
    assert not speaker.has_work


def test_speech_that_never_fits_is_refused(omni: LoadedEngine) -> None:
    speaker = new_speaker(omni, num_blocks=1)
    with pytest.raises(RequestTooLong, match="at most 64 fit"):
        speaker.add(speech_request(omni, asked((1,) * 60)))
    assert not speaker.has_work


def test_speech_that_was_told_more_frames_than_fit_is_refused_and_holds_nobody_up(omni: LoadedEngine) -> None:
    speaker = new_speaker(omni, num_blocks=1)
    request = speech_request(omni, *QUESTION, sampling=replace(GREEDY, max_tokens=120))
    with pytest.raises(RequestTooLong, match="at most 64 fit"):
        speaker.add(resumed(request, [(0,) * NUM_CODES] * 64))
    assert not speaker.has_work


def test_speech_behind_a_long_prompt_ends_where_there_is_no_more_room(omni: LoadedEngine) -> None:
    request = speech_request(omni, *QUESTION, sampling=replace(GREEDY, max_tokens=120))
    whole = speak(omni, new_speaker(omni), [request])
    cut = speak(omni, new_speaker(omni, num_blocks=2), [request])
    room = 128 - check_speech(speech_facts(omni), request, omni.config.vocab_size).num_positions
    assert 0 < room < len(whole.of())
    assert cut.of() == whole.of()[:room]
    assert cut.ends == {"s": "length"}


def test_what_a_request_cannot_ask_for_is_refused(omni: LoadedEngine) -> None:
    speaker = new_speaker(omni)
    request = speech_request(omni, *QUESTION)
    for change, reason in (
        ({"speech": SpeechWish((1, 2), "nobody")}, "no voice 'nobody', only aiden, chelsie, ethan"),
        ({"speech": SpeechWish((1, 512), "ethan")}, "token id 512 is outside the vocabulary of 512"),
        ({"speech": SpeechWish((TURN_END,), "ethan")}, "nothing to speak"),
        ({"prompt_ids": (1, 2, 3)}, "no turn of the assistant"),
        ({"generated_ids": (1,) * (NUM_CODES + 1)}, "no frames of 16 codes below 64"),
        ({"generated_ids": (64,) * NUM_CODES}, "no frames of 16 codes below 64"),
        ({"generated_ids": (1,) * NUM_CODES * 30}, "leaves nothing to speak"),
    ):
        with pytest.raises(PromptInvalid, match=reason):
            speaker.add(replace(request, **change))
    with pytest.raises(PromptInvalid, match="0 hidden states for 9 positions"):
        speaker.add(speech_request(omni, asked(image(24, 24))))
    speaker.add(request)
    with pytest.raises(ValueError, match="in use"):
        speaker.add(request)


def test_numbers_that_are_not_finite_end_one_speech_alone(omni: LoadedEngine) -> None:
    others = [speech_request(omni, *QUESTION, name=name) for name in ("first", "third")]
    expected = speak(omni, new_speaker(omni), others)
    seen = speech_request(omni, asked(image(8, 8), tuple(b"What?")), name="second")
    speaker = new_speaker(omni)
    speaker.add(others[0])
    states = torch.full((1, omni.config.hidden_size), float("nan"))
    speaker.add(seen, states)
    speaker.add(others[1])
    frames: dict[str, list[tuple[int, ...]]] = {"first": [], "third": []}
    failures = []
    while speaker.has_work:
        for event in speaker.step():
            if event.error is not None:
                failures.append((event.request_id, event.error))
            else:
                frames[event.request_id].append(event.frame)
    assert failures == [("second", NOT_FINITE)]
    assert frames == expected.frames
    assert not speaker.pool.keys.isnan().any()


def test_speech_removed_before_its_first_frame_leaves_no_number_that_is_not_finite(
    omni: LoadedEngine,
) -> None:
    speaker = new_speaker(omni, limits=SpeakerLimits(prompt_rows=12))
    seen = speech_request(omni, asked(image(8, 8), tuple(b"What is this?")))
    speaker.add(seen, torch.full((1, omni.config.hidden_size), float("nan")))
    speaker.step()
    assert speaker.pool.keys.isnan().any()
    speaker.remove("s")
    assert not speaker.pool.keys.isnan().any()


def test_code_predictor_that_is_not_finite_leaves_nothing_behind(
    omni: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block of keys and values is the next speech's."""
    request = speech_request(omni, *QUESTION)
    speaker = new_speaker(omni)
    expected = speak(omni, speaker, [request])
    talk = speaker._talk

    def poisoned(chunks):  # type: ignore[no-untyped-def]
        done, logits_LV, hidden_LD = talk(chunks)
        return done, logits_LV, hidden_LD * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(speaker, "_talk", poisoned)
        assert speak(omni, speaker, [request]).ends == {"s": NOT_FINITE}
    assert speak(omni, speaker, [request]) == expected


def test_expert_that_fails_ends_the_speeches_of_its_step(
    omni: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = new_speaker(omni)
    speaker.add(speech_request(omni, *QUESTION))

    class Failed(ExpertError):
        pass

    def fail(*_: object) -> None:
        raise Failed

    with monkeypatch.context() as patch:
        patch.setattr(speaker.parts.talker, "forward", fail)
        (event,) = speaker.step()
    assert (event.finish_reason, event.error) == ("error", EXPERT_FAILED)
    assert speaker.allocator.num_used == 0
    assert speak(omni, speaker, [speech_request(omni, *QUESTION)]).ends == {"s": "length"}


def test_speech_that_ends_itself_stops_and_tells_no_frame(omni: LoadedEngine) -> None:
    speaker = new_speaker(omni)
    for seed in range(60):  # so hot that one of them soon draws the id that ends it
        sampling = SamplingParams(max_tokens=40, temperature=1.9, seed=seed)
        found = speak(omni, speaker, [speech_request(omni, *QUESTION, sampling=sampling)])
        if found.ends["s"] == "stop":
            break
    assert found.ends["s"] == "stop"
    assert len(found.of()) < 40 and all(0 <= code < 64 for frame in found.of() for code in frame)


@pytest.mark.parametrize("width_off, kv_budget_bytes", [(1, 1 << 20), (0, 1)])
def test_speaker_that_cannot_be_opened_lets_go_of_the_experts(
    omni: LoadedEngine, monkeypatch: pytest.MonkeyPatch, width_off: int, kv_budget_bytes: int
) -> None:
    closed: list[ExpertWorker] = []
    close = ExpertWorker.close
    monkeypatch.setattr(ExpertWorker, "close", lambda worker: (closed.append(worker), close(worker)))
    embeddings_VD = omni.engine.backbone.embeddings_VD
    other_VD = embeddings_VD.new_zeros(len(embeddings_VD), embeddings_VD.shape[1] + width_off)
    options = SpeakerOptions(kv_budget_bytes=kv_budget_bytes)
    with pytest.raises((ConfigUnsupported, WeightMismatch)):
        open_speaker(omni.store, speech_facts(omni), other_VD, omni.dtype, options, prove_once)
    assert len(closed) == 1
