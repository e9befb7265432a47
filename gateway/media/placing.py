"""Puts media where a rendered chat template has a token for them: as many tokens as each has. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.media.errors import MediumRefused
from router.media.facts import MediaFacts
from router.media.items import Medium, PlacedMedium


def place_media(
    ids: Sequence[int], media: Sequence[Medium], facts: MediaFacts
) -> tuple[list[int], tuple[PlacedMedium, ...]]:
    """ids: with one token for each medium, in their order. Returns the prompt's ids, and where the media stand.

    Raises MediumRefused where the template has other places.
    """
    kinds = {part.token_id for part in (facts.image, facts.sound) if part is not None}
    placed: list[PlacedMedium] = []
    result: list[int] = []
    for token_id in ids:
        if token_id not in kinds:
            result.append(token_id)
            continue
        if len(placed) == len(media) or facts.token_id(media[len(placed)]) != token_id:
            raise MediumRefused(_MISPLACED)
        medium = media[len(placed)]
        placed.append(PlacedMedium(len(result), medium))
        result += [token_id] * facts.num_tokens(medium)
    if len(placed) != len(media):
        raise MediumRefused(_MISPLACED)
    return result, tuple(placed)


_MISPLACED = "have images or sound for which the model's chat template has no place"
