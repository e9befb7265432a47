"""Pictures show what they were given; how they look is for eyes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.evaluation.plots import (
    LABEL_SIDES,
    LABEL_SIZE,
    TOUCH,
    FrontierPoint,
    draw_coactivation,
    draw_frontier,
    draw_layers,
    draw_miss_curves,
    draw_use,
    new_figure,
    place_labels,
    to_png,
)
from router.trace_statistics import BELADY, MissCurve


def test_use_is_shown_as_multiples_of_an_even_share_in_the_chosen_layers() -> None:
    axes = new_figure(4, 3).subplots()
    draw_use(axes, np.array([[1, 1, 1, 5], [0, 0, 0, 0], [2, 2, 2, 2]]), [0, 2], "use")
    assert axes.images[0].get_array().tolist() == [[0.5, 0.5, 0.5, 2.5], [1.0, 1.0, 1.0, 1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]


def test_coactivation_is_shown_on_a_log_scale_and_keeps_what_was_never_used_blank() -> None:
    axes = new_figure(4, 4).subplots()
    draw_coactivation(axes, np.array([[np.nan, 2.0], [0.0, np.nan]]), "together")
    shown = axes.images[0].get_array()
    assert (shown[0, 1], shown[1, 0]) == (1.0, -3.0)
    assert np.ma.getmaskarray(shown).tolist() == [[True, False], [False, True]]


def test_lines_are_named_and_the_optimum_stands_out() -> None:
    axes = new_figure(4, 3).subplots()
    draw_miss_curves(
        axes, (0.5, 1.0), [MissCurve("lru", (0.4, 0.1)), MissCurve(BELADY, (0.2, 0.1))], "misses"
    )
    assert [line.get_label() for line in axes.lines] == ["lru", "belady (optimum)"]
    assert axes.lines[1].get_linestyle() == "--"
    axes = new_figure(4, 3).subplots()
    draw_layers(axes, [0, 2], {"a": np.array([0.9, 1.0])}, "evenness", "entropy")
    assert axes.lines[0].get_ydata().tolist() == [0.9, 1.0]


def test_frontier_is_drawn_from_few_misses_to_many() -> None:
    axes = new_figure(4, 3).subplots()
    points = [FrontierPoint(0.6, 40.0, "25%", (39.0, 41.0)), FrontierPoint(0.3, 41.0, "50%")]
    draw_frontier(axes, {"native": points}, "frontier")
    assert axes.lines[0].get_xdata() == pytest.approx([0.3, 0.6])
    assert axes.lines[0].get_ydata() == pytest.approx([41.0, 40.0])
    assert {text.get_text() for text in axes.texts} == {"25%", "50%"}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=20))
def test_every_label_stands_beside_its_point(points: list[tuple[float, float]]) -> None:
    sides = place_labels(points)
    assert len(sides) == len(points) and (0.0, 0.0) not in sides


def test_labels_of_neighbours_do_not_cover_each_other_nor_the_points() -> None:
    width, height = LABEL_SIZE
    points = [(0.5, 0.5), (0.5 + width / 2, 0.5), (0.5, 0.5 + height)]
    sides = place_labels(points)
    centres = [(x + a * width, y + b * height) for (x, y), (a, b) in zip(points, sides, strict=True)]
    things = [*points, *centres]
    for index, (x, y) in enumerate(centres):
        others = things[: len(points) + index] + things[len(points) + index + 1 :]
        assert all(abs(x - a) >= width * TOUCH or abs(y - b) >= height * TOUCH for a, b in others)
    assert place_labels([(0.5, 0.5)]) == [LABEL_SIDES[0]]


def test_picture_is_a_png() -> None:
    figure = new_figure(2, 2)
    figure.subplots().plot([1, 2])
    assert to_png(figure).startswith(b"\x89PNG\r\n")
