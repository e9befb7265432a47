"""Images from files: the pixels of `transformers`, and files that are no images, too large, or made to hurt."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gateway.media.errors import MediumRefused
from gateway.media.image_file import decode_image
from router.media.facts import MOST_IMAGE_TOKENS, ImageFacts
from router.media.preprocessing import patches
from tests.gateway.media.files import image_file, picture

FACTS = ImageFacts(1, 16, 2, 2, 3136, MOST_IMAGE_TOKENS * 1024, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))


def _published(image: PIL.Image.Image) -> dict[str, Any]:
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        size={"shortest_edge": FACTS.min_pixels, "longest_edge": FACTS.max_pixels},
        image_mean=list(FACTS.mean),
        image_std=list(FACTS.std),
    )
    return dict(processor(image.convert("RGB"), return_tensors="pt"))


@pytest.mark.parametrize(
    "size", [(480, 640), (64, 64), (20, 9), (31, 1700), (1080, 1920), (2100, 1900), (33, 47), (1, 100)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_patches_are_those_of_transformers(size: tuple[int, int], mode: str) -> None:
    image = picture(*size).convert(mode)
    ours, theirs = decode_image(image_file(image), FACTS), _published(image)
    assert FACTS.grid(ours) == tuple((theirs["image_grid_thw"][0, 1:] // 2).tolist())
    torch.testing.assert_close(
        torch.from_numpy(patches(ours, FACTS)), theirs["pixel_values"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("form", "options"), [("JPEG", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_every_format_is_decoded(form: str, options: dict[str, Any]) -> None:
    image = picture(64, 96)
    decoded = decode_image(image_file(image, form, **options), FACTS)
    pixels = np.frombuffer(decoded.pixels, np.uint8).reshape(64, 96, 3).astype(int)
    assert np.abs(pixels - np.asarray(image)).mean() < (6 if form == "JPEG" else 0.01)


def test_greys_of_16_bits_stay_greys() -> None:
    """As depth and medical images have them."""
    ramp = np.linspace(0, 65_535, 64 * 64).reshape(64, 64)
    decoded = decode_image(image_file(PIL.Image.fromarray(ramp.astype(np.uint16))), FACTS)
    pixels = np.frombuffer(decoded.pixels, np.uint8).reshape(64, 64, 3)
    assert np.abs(pixels - ramp[:, :, None] / 257).max() <= 1


def test_image_is_turned_as_its_exif_says() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(image_file(picture(64, 160), "JPEG", exif=exif), FACTS)
    assert (decoded.height, decoded.width) == (160, 64)


def test_largest_images_have_as_many_tokens_as_are_allowed() -> None:
    rows, columns = FACTS.grid(decode_image(image_file(picture(4000, 3000), "JPEG"), FACTS))
    assert 0.9 * MOST_IMAGE_TOKENS < rows * columns <= MOST_IMAGE_TOKENS


def _png(width: int, height: int, colours: int = 2, data: bytes | None = None) -> bytes:
    """A valid PNG of any size; one colour compresses to nearly nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    if data is None:
        row_bytes = 1 + width * {0: 1, 2: 3, 6: 4}[colours]
        packer = zlib.compressobj(9)
        data = b"".join(packer.compress(bytes(row_bytes)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _animated() -> bytes:
    file = io.BytesIO()
    frames = [picture(32, 32, seed) for seed in range(3)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no image of a known format"),
        (b"GIF89a" + bytes(100), "no image of a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known format"),
        (_png(30_000, 30_000, data=b""), "at most 16777216"),
        (_png(100_000, 1, data=b""), "more than 200 times"),
        (_png(64, 64, data=zlib.compress(bytes(10))), "damaged"),
        (image_file(picture(64, 64))[:200], "damaged"),
        (_animated(), "several frames"),
    ],
)
def test_what_cannot_be_used_is_refused_by_what_is_wrong(content: bytes, reason: str) -> None:
    with pytest.raises(MediumRefused, match=reason):
        decode_image(content, FACTS)


def test_jpeg_of_many_scans_is_refused_and_a_progressive_one_is_not() -> None:
    content = image_file(picture(64, 64), "JPEG", progressive=True)
    assert decode_image(content, FACTS).width == 64
    scan = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(MediumRefused, match="more than 128 scans"):
        decode_image(content[:-2] + scan * 128 + content[-2:], FACTS)


def test_damaged_files_are_refused_or_decoded_and_nothing_else() -> None:
    chance = random.Random(3)
    sound = [
        image_file(picture(40, 40), form, **options)
        for form, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("WEBP", {}))
    ]
    num_refused = 0
    for _ in range(400):
        content = bytearray(chance.choice(sound))
        for _ in range(chance.randrange(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            decode_image(bytes(content[: chance.randrange(20, len(content) + 1)]), FACTS)
        except MediumRefused:
            num_refused += 1
    assert num_refused > 200


def test_first_picture_of_a_photograph_with_several_is_taken() -> None:
    """As telephones make them: with a preview, or what another lens saw."""
    first, file = picture(64, 96), io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[picture(32, 32)])
    content = file.getvalue()
    assert PIL.Image.open(io.BytesIO(content)).format == "MPO"
    assert decode_image(content, FACTS) == decode_image(image_file(first, "JPEG"), FACTS)


def _texts(number: int) -> PngInfo:
    """Of a mebibyte each; Pillow takes 64 of them."""
    texts = PngInfo()
    for each in range(number):
        texts.add_text(f"text {each}", "x" * (1 << 20), zip=True)
    return texts


def _turned() -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("size", "form", "options"),
    [
        ((4096, 4096), "PNG", {"exif": _turned()}),
        ((4096, 4096), "PNG", {"exif": _turned(), "pnginfo": _texts(63)}),
        ((4000, 3000), "WEBP", {"exif": _turned(), "lossless": True}),
        ((4000, 3000), "WEBP", {"exif": _turned()}),
    ],
)
def test_largest_file_takes_no_more_than_256_mebibytes(
    size: tuple[int, int], form: str, options: dict[str, Any]
) -> None:
    """In a process of its own, above what it is without."""
    content = image_file(PIL.Image.new("RGBA", size), form, **options)
    assert len(content) < 1_000_000
    script = """
import sys
from gateway.media.image_file import decode_image
from router.media.facts import ImageFacts
from tests.gateway.media.files import image_file, peak_bytes, picture
facts = ImageFacts(1, 16, 2, 2, 3136, 1280 * 1024, (0.5,) * 3, (0.5,) * 3)
decode_image(image_file(picture(64, 64)), facts)
before = peak_bytes()
decode_image(sys.stdin.buffer.read(), facts)
print(peak_bytes() - before)
"""
    run = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, check=True)
    assert int(run.stdout) < 256 << 20


def test_larger_webp_is_refused_before_it_is_decoded() -> None:
    content = image_file(PIL.Image.new("RGB", (4000, 3001)), "WEBP")
    with pytest.raises(MediumRefused, match="at most 12000000"):
        decode_image(content, FACTS)
