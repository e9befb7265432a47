"""What a model hears and sees, and how many tokens stand for it: read from a store's description, without PyTorch.

Pure but for reading one small file. Called by the gateway, which sizes images and places tokens, and by
`router.media.encoder`. Source: `transformers`, processing_qwen3_omni_moe and image_processing_qwen2_vl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extraction.decoder_config import read_size
from extraction.errors import ExtractionError
from extraction.files import read_small_file
from extraction.manifest import Manifest
from extraction.strict_json import parse_object
from router.errors import ConfigUnsupported
from router.media.items import SAMPLE_RATE, Image, Medium, Sound

FAMILY = "qwen3_omni_moe"
VISION, AUDIO = "vision", "audio"
"""Components of its store."""
PREPROCESSOR_FILE = "preprocessor_config.json"
MAX_FILE_BYTES = 1 << 20
MOST_IMAGE_TOKENS = 1280
"""An image is made smaller until it has no more: 1.3 million pixels. The time that a tower takes grows faster than the
number of tokens, and published models allow ten times as many."""
LARGEST_RATIO = 200
"""Of an image's sides."""
HOP = 160
"""Samples from one frame of a spectrum to the next."""
CHUNK_FRAMES = 100
"""Of what the audio tower looks at in one piece; the family's program knows no other number."""
LEAST_SAMPLES = SAMPLE_RATE // 10


@dataclass(frozen=True)
class ImageFacts:
    """How images are cut and counted."""

    token_id: int
    patch_size: int
    merge_size: int
    """So many patches by as many become one token."""
    temporal_patch_size: int
    """An image stands for so many equal frames."""
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def factor(self) -> int:
        """Of which sides are multiples: those of one token."""
        return self.patch_size * self.merge_size

    def sized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is brought to: multiples of `factor`, the ratio nearly as it was.

        Raises ValueError where one side is more than LARGEST_RATIO times the other.
        """
        if max(height, width) > LARGEST_RATIO * min(height, width):
            raise ValueError(f"one side is more than {LARGEST_RATIO} times the other")
        factor = self.factor
        rounded = round(height / factor) * factor, round(width / factor) * factor
        pixels = rounded[0] * rounded[1]
        if pixels > self.max_pixels:
            beta = math.sqrt(height * width / self.max_pixels)
            return (
                max(factor, math.floor(height / beta / factor) * factor),
                max(factor, math.floor(width / beta / factor) * factor),
            )
        if pixels < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
        return rounded

    def grid(self, image: Image) -> tuple[int, int]:
        """Rows and columns of its tokens."""
        return image.height // self.factor, image.width // self.factor


@dataclass(frozen=True)
class SoundFacts:
    """How sound is counted."""

    token_id: int
    num_mel_bins: int


@dataclass(frozen=True)
class MediaFacts:
    """What the model takes beside text; None for what it does not take."""

    image: ImageFacts | None
    sound: SoundFacts | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """As people call them."""
        taken = {"image": self.image, "audio": self.sound}
        return tuple(kind for kind, facts in taken.items() if facts is not None)

    def token_id(self, medium: Medium) -> int:
        """Of the tokens that stand for it. Raises ValueError where the model does not take such."""
        facts = self.image if isinstance(medium, Image) else self.sound
        if facts is None:
            raise ValueError(f"the model takes no {'images' if isinstance(medium, Image) else 'sound'}")
        return facts.token_id

    def num_tokens(self, medium: Medium) -> int:
        """How many stand for it."""
        if isinstance(medium, Sound):
            return sound_tokens(num_frames(medium.num_samples))
        assert self.image is not None
        rows, columns = self.image.grid(medium)
        return rows * columns


NO_MEDIA = MediaFacts(None, None)


def num_frames(num_samples: int) -> int:
    """Of a sound's spectrum."""
    return num_samples // HOP


def sound_tokens(frames: int) -> int:
    """13 for each whole chunk; what is left is halved three times, rounded up."""
    left = frames % CHUNK_FRAMES
    return frames // CHUNK_FRAMES * halved(CHUNK_FRAMES) + halved(left)


def halved(frames: int) -> int:
    """What three convolutions with a stride of two leave."""
    for _ in range(3):
        frames = (frames + 1) // 2
    return frames


def read_media_facts(manifest: Manifest, root: Path) -> MediaFacts:
    """What the store at `root` has the parts for. Raises ConfigUnsupported where their description is damaged."""
    if manifest.family != FAMILY:
        return NO_MEDIA
    parts = {component.name: component.config for component in manifest.components}
    try:
        thinker = manifest.config.get("thinker_config")
        ids: Mapping[str, Any] = thinker if isinstance(thinker, dict) else {}
        image = sound = None
        if VISION in parts:
            image = _image_facts(parts[VISION], ids, _preprocessor(manifest, root))
        if AUDIO in parts:
            sound = _sound_facts(parts[AUDIO], ids)
    except ExtractionError as error:
        raise ConfigUnsupported("media", str(error)) from error
    return MediaFacts(image, sound)


def _preprocessor(manifest: Manifest, root: Path) -> Mapping[str, Any]:
    """Stores of checkpoints without the file, and those made before it was kept, have the published values."""
    if PREPROCESSOR_FILE not in manifest.files:
        return {}
    return parse_object(read_small_file(root, PREPROCESSOR_FILE, MAX_FILE_BYTES), PREPROCESSOR_FILE)


def _image_facts(
    vision: Mapping[str, Any], ids: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> ImageFacts:
    patch, merge = read_size(vision, "patch_size", 16), read_size(vision, "spatial_merge_size", 2)
    token_pixels = (patch * merge) ** 2
    most = _pixels(preprocessor, "max_pixels", "longest_edge", 12_845_056)
    most = max(token_pixels, min(most, MOST_IMAGE_TOKENS * token_pixels))
    least = _pixels(preprocessor, "min_pixels", "shortest_edge", 3136)
    return ImageFacts(
        read_size(ids, "image_token_id"),
        patch,
        merge,
        read_size(vision, "temporal_patch_size", 2),
        min(least, most),
        most,
        _channels(preprocessor, "image_mean"),
        _channels(preprocessor, "image_std"),
    )


def _sound_facts(audio: Mapping[str, Any], ids: Mapping[str, Any]) -> SoundFacts:
    if 2 * read_size(audio, "n_window", 50) != CHUNK_FRAMES:
        raise ConfigUnsupported("audio_config.n_window", f"is not {CHUNK_FRAMES // 2}")
    return SoundFacts(read_size(ids, "audio_token_id"), read_size(audio, "num_mel_bins", 128))


def _pixels(preprocessor: Mapping[str, Any], key: str, edge: str, default: int) -> int:
    """Newer files have an image's bounds under the names of edges."""
    size = preprocessor.get("size")
    bounds = size if isinstance(size, dict) else {}
    return read_size({key: preprocessor.get(key, bounds.get(edge))}, key, default)


def _channels(config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = config.get(key, [0.5, 0.5, 0.5])
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(x, int | float) and math.isfinite(x) and -1e3 < x < 1e3 for x in value)
        or (key == "image_std" and not all(value))
    ):
        raise ConfigUnsupported(f"{PREPROCESSOR_FILE}: {key}", "is no list of three numbers")
    red, green, blue = map(float, value)
    return red, green, blue
