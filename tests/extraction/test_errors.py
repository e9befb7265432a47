"""Messages: one line, whatever the names in them hold."""

from __future__ import annotations

import pytest

from extraction.errors import (
    MAX_MESSAGE_CHARS,
    CheckpointDamaged,
    DestinationOccupied,
    DiskFull,
    ExtractionError,
    FamilyUnknown,
    ManifestInvalid,
    PathRefused,
    TensorsMissing,
    TensorUnexpected,
)

HOSTILE = "a\nb\rc\x1b[31md\x00e\u2028f\x9bg\u202eh\ud800i"


@pytest.mark.parametrize(
    "error",
    [
        CheckpointDamaged(HOSTILE, HOSTILE),
        TensorsMissing((HOSTILE, HOSTILE), 2),
        TensorUnexpected(HOSTILE, HOSTILE),
        FamilyUnknown(HOSTILE, ("qwen3_moe",)),
        PathRefused(HOSTILE, HOSTILE),
        DestinationOccupied(HOSTILE),
        DiskFull(HOSTILE, 2, 1),
        ManifestInvalid(HOSTILE, HOSTILE),
    ],
)
def test_control_characters_of_a_name_are_escaped(error: ExtractionError) -> None:
    assert str(error).isprintable()
    str(error).encode()


def test_endless_name_keeps_both_ends_of_the_message() -> None:
    message = str(TensorUnexpected("x" * 1_000_000, "has shape [1]"))
    assert len(message) < MAX_MESSAGE_CHARS + 10
    assert message.startswith("tensor xxx")
    assert message.endswith("has shape [1]")


def test_accents_and_other_scripts_stay_as_they_are() -> None:
    assert str(PathRefused("modèle/専門家", "is a link")) == "modèle/専門家: is a link"
