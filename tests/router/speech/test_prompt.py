"""Which positions the talker is shown, from made-up ids."""

from __future__ import annotations

import pytest

from router.errors import PromptInvalid
from router.speech.facts import CodecIds, SpeechDefaults, SpeechFacts, TurnIds
from router.speech.prompt import plan_prompt
from router.speech.wish import SpeechWish

START, USER, ASSISTANT, SYSTEM, END, BREAK = 1, 2, 3, 4, 5, 6
SPEECH_START, SPEECH_END, PAD, MEDIUM = 7, 8, 9, 10
FACTS = SpeechFacts(
    {"ethan": 90, "aiden": 91},
    TurnIds(START, USER, ASSISTANT, SPEECH_START, SPEECH_END, PAD, frozenset({MEDIUM}), frozenset({END})),
    CodecIds(80, pad=81, begin=82, end=83, no_thought=84, thought_begin=85, thought_end=86),
    1,
    SpeechDefaults(),
)
ANSWER = (START, ASSISTANT, BREAK)


def test_user_s_turns_are_shown_and_all_others_are_not() -> None:
    first, second = (START, USER, BREAK, 20, MEDIUM, MEDIUM, END, BREAK), (START, USER, BREAK, 21, END, BREAK)
    others = (30, 31, START, SYSTEM, BREAK, 32, END, BREAK), (*ANSWER, 33, MEDIUM, END, BREAK)
    prompt = (*others[0], *first, *others[1], *second, *ANSWER)
    plan = plan_prompt(FACTS, prompt, SpeechWish((50, 51, END), "ethan"))
    assert tuple(prompt[index] for index in plan.shown) == first + second
    assert plan.shown[0] == len(others[0])
    assert tuple(prompt[index] for index in plan.media_indices) == (MEDIUM, MEDIUM)
    assert plan.media_indices == (len(others[0]) + 4, len(others[0]) + 5)


def test_speech_is_announced_and_the_reply_trails_it() -> None:
    plan = plan_prompt(FACTS, (START, USER, BREAK, *ANSWER), SpeechWish((50, 51, 52, END), "aiden"))
    assert plan.lead_ids == (*ANSWER, PAD, PAD, PAD, PAD, SPEECH_START, 50)
    assert plan.lead_codes == (None, None, None, 84, 85, 86, 91, 81, 82)
    assert plan.trailing_ids == (51, 52, SPEECH_END)
    assert plan.num_positions == 3 + 9


@pytest.mark.parametrize("reply", [(50, 51), (50, 51, END)])
def test_reply_that_was_cut_off_is_spoken_to_its_last_token(reply: tuple[int, ...]) -> None:
    plan = plan_prompt(FACTS, ANSWER, SpeechWish(reply, "ethan"))
    assert plan.lead_ids[-1:] + plan.trailing_ids == (50, 51, SPEECH_END)


def test_answer_that_was_begun_for_the_model_is_spoken_from_its_begin() -> None:
    plan = plan_prompt(FACTS, (*ANSWER, 40, 41), SpeechWish((50, END), "ethan"))
    assert plan.lead_ids[-1:] + plan.trailing_ids == (40, 41, 50, SPEECH_END)


def test_conversation_without_a_question_is_spoken_too() -> None:
    plan = plan_prompt(FACTS, (START, SYSTEM, BREAK, 32, END, BREAK, *ANSWER), SpeechWish((50,), "ethan"))
    assert plan.shown == () and plan.num_positions == 9


@pytest.mark.parametrize(
    ("prompt", "wish", "reason"),
    [
        (ANSWER, SpeechWish((50,), "Ethan"), "no voice 'Ethan', only ethan, aiden"),
        (ANSWER, SpeechWish((), "ethan"), "nothing to speak"),
        (ANSWER, SpeechWish((END,), "ethan"), "nothing to speak"),
        ((START, USER, BREAK), SpeechWish((50,), "ethan"), "no turn of the assistant"),
        ((), SpeechWish((50,), "ethan"), "no turn of the assistant"),
    ],
)
def test_what_cannot_be_spoken_is_refused(prompt: tuple[int, ...], wish: SpeechWish, reason: str) -> None:
    with pytest.raises(PromptInvalid, match=reason):
        plan_prompt(FACTS, prompt, wish)
