"""The media of a request's messages, decoded, and what is wrong with them as an HTTP answer. Called by
`gateway.http.jobs`."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.errors import ApiError
from gateway.http.openai_types import Message
from gateway.media.decoder import MediaDecoder, check_number
from gateway.media.errors import MediumRefused
from gateway.media.parts import AudioPart, ImagePart
from gateway.media.placing import place_media
from router.media.facts import NO_MEDIA
from router.media.items import Medium, PlacedMedium

TEXT_ONLY = MediaDecoder(NO_MEDIA)
CODE = "invalid_media"


async def decode_media(
    messages: Sequence[Message], decoder: MediaDecoder, context_length: int
) -> list[Medium]:
    """In their order. Raises ApiError 400 that names the part, also of the first that is beyond the model's context;
    RouterBusy where open requests have too many."""
    found = _media_parts(messages)
    if not found:
        return []
    try:
        check_number(found)
    except MediumRefused as error:
        raise _refusal("messages", error) from error
    media: list[Medium] = []
    num_tokens = 0
    with decoder.held.reserved(sum(part.num_chars for _, part in found)):
        for field, part in found:
            try:
                media.append(await decoder.decode(part))
            except MediumRefused as error:
                raise _refusal(field, error) from error
            num_tokens += decoder.facts.num_tokens(media[-1])
            if num_tokens > context_length:
                message = (
                    f"The model's context is {context_length} tokens. Up to {field} media have {num_tokens}."
                )
                raise ApiError(400, message, param=field, code="context_length_exceeded")
    return media


def placed_in(
    prompt_ids: Sequence[int], media: Sequence[Medium], decoder: MediaDecoder
) -> tuple[list[int], tuple[PlacedMedium, ...]]:
    """Raises ApiError 400 where the chat template has no place for them."""
    if not media:
        return list(prompt_ids), ()
    try:
        return place_media(prompt_ids, media, decoder.facts)
    except MediumRefused as error:
        raise _refusal("messages", error) from error


def _media_parts(messages: Sequence[Message]) -> list[tuple[str, ImagePart | AudioPart]]:
    """With the names of their fields. Raises ApiError 400 for media that nobody shows to the model."""
    found: list[tuple[str, ImagePart | AudioPart]] = []
    for number, message in enumerate(messages):
        for position, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
            if not isinstance(part, ImagePart | AudioPart):
                continue
            field = f"messages.{number}.content.{position}"
            if message.role != "user":
                raise _refusal(field, MediumRefused("is an image or sound in a message not by the user"))
            found.append((field, part))
    return found


def _refusal(field: str, error: MediumRefused) -> ApiError:
    return ApiError(400, f"{field} {error.reason}.", param=field, code=CODE)
