"""Decodes an image file within limits, and brings it to the size that the model takes.

What decides about memory is read from the file's head before anything is decoded. Pixels are what `transformers` makes
of the same file without torchvision: turned as its EXIF says, RGB, resized by Pillow; only greys of 16 bits stay greys
here. Called by `gateway.media.decoder`.
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
"""Of a file, 4096 x 4096. Decoded, and turned or as RGB, they take 128 MiB, beside a PNG's texts of 64 at most."""
MOST_WEBP_PIXELS = 12_000_000
"""Its decoder keeps three pictures beside ours: 20 bytes a pixel, with one that is turned."""

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
        _check(opened, facts)
        opened.load()
        PIL.ImageOps.exif_transpose(opened, in_place=True)
        height, width = facts.sized(opened.height, opened.width)
        pixels = _colours(opened).resize((width, height), PIL.Image.Resampling.BICUBIC)
    return Image(height, width, pixels.tobytes())


def _colours(opened: PIL.Image.Image) -> PIL.Image.Image:
    if opened.mode == "I;16":  # of which Pillow, and with it `transformers`, makes white what is above 255
        opened = opened.point(lambda value: value * (255 / 65_535))
    return opened if opened.mode == "RGB" else opened.convert("RGB")


def _check(opened: PIL.Image.Image, facts: ImageFacts) -> None:
    """By the head of the file alone."""
    width, height = opened.size
    most = MOST_WEBP_PIXELS if opened.format == "WEBP" else MOST_PIXELS
    if width * height > most:
        raise MediumRefused(f"has {width} x {height} pixels; at most {most} are taken")
    # A photograph may bring its preview, or what another lens saw (MPO); the first is the one that everybody shows.
    if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
        raise MediumRefused("has several frames; moving images are not supported")
    try:
        facts.sized(height, width)
    except ValueError as error:
        raise MediumRefused(f"has {width} x {height} pixels: {error}") from error
