"""What goes to our own C source for the signals is checked before, whatever it is; values are in test_snarc.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experts.native_products import LEVELS, library
from router.native_signals import conflict_of, past_signals

FOUND = library()
HERE = LEVELS[: LEVELS.index(FOUND.best_level) + 1] if FOUND is not None else ()
pytestmark = pytest.mark.skipif(not HERE, reason="there are no products of our own")
ROWS, GROUPS, SIZE, RING, BACK = 3, 4, 8, 16, 5


def given(**changes: Any) -> list[Any]:
    fitting = {
        "hidden": torch.ones(ROWS, GROUPS * SIZE),
        "signs": torch.ones(GROUPS, SIZE),
        "ring": (torch.zeros(RING, SIZE), torch.zeros(RING)),
        "past": torch.zeros(ROWS, BACK, dtype=torch.int64),
        "recent": 2,
        "existing": (torch.ones(ROWS), torch.ones(ROWS)),
        "kept": (None, torch.zeros(ROWS, SIZE), torch.zeros(ROWS)),
        "asked": (True, True, True),
    }
    return list((fitting | changes).values())


def test_what_fits_is_computed_and_kept_at_every_level() -> None:
    found = []
    for level in HERE:
        kept = torch.zeros(ROWS, SIZE), torch.zeros(ROWS)
        found.append(past_signals(level, *given(kept=(None, *kept))))
        assert bool(kept[0].all()) and kept[1].tolist() == pytest.approx([GROUPS * SIZE**0.5] * ROWS)
    assert all(torch.equal(one, first) for each in found for one, first in zip(each, found[0], strict=True))


def test_rows_that_lie_apart_give_the_same_bits() -> None:
    wide = torch.randn(ROWS, 2 * GROUPS * SIZE).bfloat16()
    apart, alone = wide[:, : GROUPS * SIZE], wide[:, : GROUPS * SIZE].contiguous()
    first, second = (past_signals(HERE[-1], *given(hidden=hidden)) for hidden in (apart, alone))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": torch.ones(ROWS, GROUPS * SIZE - 1)},
        {"hidden": torch.ones(ROWS, GROUPS * SIZE).half()},
        {"signs": torch.ones(GROUPS, SIZE).double()},
        {"ring": (torch.zeros(RING - 1, SIZE), torch.zeros(RING))},
        {"past": torch.full((ROWS, BACK), RING + ROWS)},
        {"past": torch.full((ROWS, BACK), -1)},
        {"past": torch.zeros(ROWS, BACK, dtype=torch.int32)},
        {"recent": BACK + 1},
        {"existing": (torch.ones(ROWS), torch.ones(ROWS - 1))},
        {"kept": (None, torch.zeros(ROWS - 1, SIZE), torch.zeros(ROWS - 1))},
        {"kept": (None, torch.zeros(ROWS, SIZE + 1), torch.zeros(ROWS))},
        {"kept": (torch.full((ROWS,), ROWS), torch.zeros(ROWS, SIZE), torch.zeros(ROWS))},
        {"kept": (torch.full((ROWS,), -1), torch.zeros(ROWS, SIZE), torch.zeros(ROWS))},
        {"kept": (torch.zeros(1, dtype=torch.int64), torch.zeros(ROWS, SIZE), torch.zeros(ROWS))},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        past_signals(HERE[-1], *given(**changes))


@pytest.mark.parametrize("logits", [torch.ones(2, 4).double(), torch.ones(2, 4).bfloat16()])
def test_logits_of_another_kind_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        conflict_of(HERE[-1], logits)


def test_one_expert_has_no_conflict() -> None:
    assert conflict_of(HERE[-1], torch.randn(3, 1)).tolist() == [0.0] * 3
