"""A prompt with image and sound files: one turn of a user's, through the model's chat template.

Called by `gateway.local.generate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experts.store import ExpertStore
from gateway.errors import ApiError, OptionInvalid
from gateway.http.openai_types import Message
from gateway.media.decoder import MediaDecoder
from gateway.media.errors import MediumRefused
from gateway.media.file import read_media_file
from gateway.media.parts import AudioPart, ImagePart, Part, TextPart
from gateway.media.placing import place_media
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.media.facts import read_media_facts
from router.media.items import Medium, PlacedMedium

MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class MediaFiles:
    """What goes before a prompt's text, in this order."""

    images: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images or self.sounds)


def media_prompt(
    store: ExpertStore, tokenizer: TextTokenizer, text: str, files: MediaFiles
) -> tuple[tuple[int, ...], tuple[PlacedMedium, ...]]:
    """The prompt's ids, and where the media stand. Raises OptionInvalid, ConfigUnsupported."""
    decoder = MediaDecoder(read_media_facts(store.manifest, store.root))
    media: list[Medium] = []
    for option, paths in (("image", files.images), ("audio", files.sounds)):
        for path in paths:
            decode = decoder.image if option == "image" else decoder.sound
            try:
                media.append(decode(read_media_file(path, MAX_FILE_BYTES)))
            except MediumRefused as error:
                raise OptionInvalid(option, f"{path} {error.reason}") from error
    parts: list[Part] = [ImagePart("") for _ in files.images]
    parts += [AudioPart("", "wav") for _ in files.sounds]
    message = Message.model_construct(role="user", content=(*parts, TextPart(text)))
    template = ChatTemplate.from_folder(store.root, tokenizer)
    try:
        ids, placed = place_media(tokenizer.encode_rendered(template.render([message])), media, decoder.facts)
    except ApiError as error:
        raise OptionInvalid("prompt", f"cannot be made a turn of a chat: {error.message}") from error
    except MediumRefused as error:
        raise OptionInvalid("prompt", f"and its files {error.reason}") from error
    finally:
        template.close()
    return tuple(ids), placed
