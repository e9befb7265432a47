"""Decodes an image file within limits, and brings it to the size that the model takes.

What decides about memory is read from the file's head before anything is decoded. Pixels are what `transformers` makes
of the same file without torchvision: turned as its EXIF says, RGB, resized by Pillow. Called by
`gateway.media.decoder`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from gateway.media.errors import MediumRefused
from router.media.facts import ImageFacts
from router.media.items import Image

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 1 << 24
"""Of a file, 4096 x 4096. Decoded, as RGB and turned they take 160 MiB at most, one file at a time."""

MOST_SCANS = 128
"""Of a JPEG. Each goes over the whole picture, and a few bytes can be one."""
SCAN = b"\xff\xda"


def decode_image(content: bytes, facts: ImageFacts) -> Image:
    """Raises MediumRefused."""
    import PIL.Image

    if content.count(SCAN) > MOST_SCANS and content.startswith(b"\xff\xd8"):
        raise MediumRefused(f"has more than {MOST_SCANS} scans")
    try:
        return _decode(content, facts)
    except MediumRefused:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise MediumRefused(f"has too many pixels; at most {MOST_PIXELS} are taken") from error
    except PIL.UnidentifiedImageError as error:
        raise MediumRefused(f"is no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise MediumRefused("is a damaged image") from error


def _decode(content: bytes, facts: ImageFacts) -> Image:
    import PIL.Image
    import PIL.ImageOps

    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        height, width = _sized(opened, facts)
        opened.load()
        turned = PIL.ImageOps.exif_transpose(opened)
        if turned.size != opened.size:
            height, width = facts.sized(turned.height, turned.width)
        pixels = turned.convert("RGB").resize((width, height), PIL.Image.Resampling.BICUBIC)
    return Image(height, width, pixels.tobytes())


def _sized(opened: PIL.Image.Image, facts: ImageFacts) -> tuple[int, int]:
    """By the head of the file alone."""
    width, height = opened.size
    if width * height > MOST_PIXELS:
        raise MediumRefused(f"has {width} x {height} pixels; at most {MOST_PIXELS} are taken")
    if getattr(opened, "n_frames", 1) > 1:
        raise MediumRefused("has several frames; moving images are not supported")
    try:
        return facts.sized(height, width)
    except ValueError as error:
        raise MediumRefused(f"has {width} x {height} pixels: {error}") from error
