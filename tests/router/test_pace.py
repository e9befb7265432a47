"""What is decided from times, without an engine and without a clock."""

from __future__ import annotations

import pytest

from router.pace import CHOICES, FIRST_ROWS, LATE_STEPS, LONGEST_STEPS, SURE_ROWS, Pace
from router.step_batch import Half

STREAM_S = 0.010
MOST = 512
BOTH: frozenset[Half] = frozenset({"attention", "experts"})


def _pace(num_layers: int, layer_s: dict[int, float]) -> Pace:
    pace = Pace(num_layers)
    pace.note_streams(STREAM_S)
    for num_rows, seconds in layer_s.items():
        pace.note_layer(num_rows, seconds)
    return pace


def test_nothing_known_means_few_rows_and_half_a_layer_a_step() -> None:
    pace = Pace(6)
    assert pace.most_rows(MOST) == FIRST_ROWS
    assert pace.most_rows(5) == 5
    assert pace.most_rows(MOST, frozenset({"attention"})) == FIRST_ROWS
    assert not pace.may_go_on("attention", 64, 1.0)


def test_halves_that_pause_in_the_middle_take_full_chunks_whatever_they_cost() -> None:
    assert Pace(6).most_rows(MOST, BOTH) == MOST
    assert _pace(6, {64: 100 * STREAM_S}).most_rows(MOST, BOTH) == MOST


def test_passes_that_pause_in_time_may_have_more_rows() -> None:
    pace = _pace(6, {})
    assert pace.most_rows(2048, BOTH) == SURE_ROWS, "nothing is known"
    pace.note_pause(512, LATE_STEPS * STREAM_S / 2)
    assert pace.most_rows(2048, BOTH) == pytest.approx(1024, abs=1)
    assert pace.most_rows(700, BOTH) == 700
    pace.note_pause(1024, 2 * LATE_STEPS * STREAM_S)
    assert pace.most_rows(2048, BOTH) == SURE_ROWS
    for _ in range(200):
        pace.note_pause(512, -0.001)
    assert pace.most_rows(2048, BOTH) == 2048, "what was late once is forgotten"


def test_many_layers_that_each_fit_take_full_chunks() -> None:
    """As a deep model at full width: a layer of 512 rows takes a part of a step of its streams."""
    pace = _pace(48, {1: STREAM_S / 48, 512: STREAM_S / 5})
    assert pace.most_rows(MOST) == 512
    assert pace.most_rows(300) == 300


def test_layers_that_take_longer_than_a_step_may_have_fewer_rows() -> None:
    pace = _pace(6, {32: 0.4 * STREAM_S, 128: 1.2 * STREAM_S, 512: 5 * STREAM_S})
    assert pace.most_rows(MOST) == 128


def test_only_what_cannot_pause_has_to_fit() -> None:
    pace = _pace(6, {512: 5 * STREAM_S})
    for _ in range(3):
        pace.note_half("attention", 512, 4 * STREAM_S)
        pace.note_half("experts", 512, STREAM_S)
    assert pace.most_rows(MOST) < MOST
    assert pace.most_rows(MOST, frozenset({"attention"})) == MOST


def test_where_not_even_a_layer_fits_the_cheapest_is_taken() -> None:
    pace = _pace(2, {8: 4 * STREAM_S, 64: 9 * STREAM_S})
    assert pace.most_rows(MOST) == CHOICES[0]


def test_prompt_overtakes_what_takes_several_times_as_long() -> None:
    pace = _pace(6, {16: 0.1, 64: 0.2, 256: 0.5, 1024: 1.0})
    assert pace.most_overtaking(1024, 6) == 64, "a quarter of 6 layers of a second is more than 6 of 0.2"
    assert pace.most_overtaking(1024, 3) == 16, "what is left of the pass counts"
    assert pace.most_overtaking(1024, 1) == 0
    assert pace.most_overtaking(1024, 6, overtaken_s=0.01) == 0, "others have overtaken it just now"
    assert Pace(6).most_overtaking(1024, 6) == 0, "nothing is known"


def test_no_prompt_overtakes_where_few_rows_take_as_long_as_many() -> None:
    """As where a pass reads all experts from disk."""
    pace = _pace(6, dict.fromkeys(CHOICES, 1.0))
    assert pace.most_overtaking(2048, 6) == 0


def test_pass_goes_on_while_half_a_layer_more_fits() -> None:
    pace = _pace(6, {64: STREAM_S})
    assert pace.longest_s == pytest.approx(LONGEST_STEPS * STREAM_S)
    assert pace.may_go_on("experts", 64, 1.01 * STREAM_S), "no more than the layer"
    assert not pace.may_go_on("experts", 64, 0.99 * STREAM_S)
    pace.note_half("experts", 64, 0.4 * STREAM_S)
    assert pace.may_go_on("experts", 64, 0.5 * STREAM_S)
    assert not pace.may_go_on("attention", 64, 0.5 * STREAM_S)


def test_steps_that_a_prompt_has_slowed_do_not_make_room_for_more_of_it() -> None:
    pace = _pace(6, {64: STREAM_S})
    for _ in range(20):
        pace.note_streams(1.6 * STREAM_S, is_beside=True)
    assert pace.longest_s == pytest.approx(LONGEST_STEPS * STREAM_S)


def test_streams_that_have_grown_beside_prompts_leave_prompts_some_room() -> None:
    pace = _pace(6, {64: STREAM_S})
    for _ in range(20):
        pace.note_streams(10 * STREAM_S, 16, is_beside=True)
    longest_s = pace.longest_s
    assert longest_s is not None and longest_s >= LONGEST_STEPS * 10 * STREAM_S / 2
    for _ in range(20):
        pace.note_streams(8 * STREAM_S, 16)
    assert pace.longest_s == pytest.approx(LONGEST_STEPS * 8 * STREAM_S)


def test_streams_that_have_become_faster_beside_prompts_wait_no_longer_for_them() -> None:
    """A step beside a prompt is not faster than the same one alone."""
    pace = Pace(6)
    for _ in range(9):
        pace.note_streams(10 * STREAM_S)
        pace.note_streams(STREAM_S, is_beside=True)
    assert pace.longest_s == pytest.approx(LONGEST_STEPS * STREAM_S)


def test_pass_gets_a_part_of_every_step_whatever_else_the_step_took() -> None:
    pace = Pace(6)
    assert pace.least_s == 0.0, "nobody has run"
    pace.note_streams(STREAM_S)
    assert pace.least_s == pytest.approx(STREAM_S / 4)


def test_single_outlier_changes_nothing() -> None:
    pace = Pace(6)
    for seconds in (1.0, 1.0, 50.0, 1.0, 1.0):
        pace.note_streams(seconds)
        pace.note_layer(64, seconds / 6)
    assert pace.longest_s == LONGEST_STEPS and pace.layer_s(64) == 1 / 6


def test_later_times_take_the_place_of_earlier_ones() -> None:
    pace = _pace(6, {64: 1.0})
    for _ in range(20):
        pace.note_layer(64, 0.25)
    assert pace.layer_s(64) == 0.25


def test_unknown_numbers_of_rows_are_expected_from_the_nearest() -> None:
    pace = _pace(6, {64: 1.0})
    assert pace.layer_s(128) == 2.0, "no more than in proportion"
    smaller = pace.layer_s(32)
    assert smaller is not None and 0.5 < smaller < 1.0, "few rows cost more each"
