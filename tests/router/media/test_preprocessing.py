"""Spectra against `transformers`, sizes and counts of tokens against its own, and what a file may say of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

from experts.store import ExpertStore
from extraction.extract import extract
from router.errors import ConfigUnsupported
from router.footprint import measure_footprint
from router.loading import EngineOptions
from router.media.facts import (
    MOST_IMAGE_TOKENS,
    PREPROCESSOR_FILE,
    ImageFacts,
    MediaFacts,
    num_frames,
    read_media_facts,
    sound_tokens,
)
from router.media.items import SAMPLE_RATE, Image, Sound
from router.media.preprocessing import log_mel, patches
from tests.checkpoints import write_tiny
from tests.omni import image, sound

FACTS = ImageFacts(1, 16, 2, 2, 3136, 1_310_720, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("seconds", [0.1, 0.513, 1.0, 7.77, 31.0])
def test_spectra_agree_with_transformers(seconds: float) -> None:
    made = sound(seconds)
    extractor = WhisperFeatureExtractor(feature_size=128)
    theirs = extractor(
        np.frombuffer(made.samples, "<f4"),
        sampling_rate=SAMPLE_RATE,
        padding=True,
        truncation=False,
        return_attention_mask=True,
    )
    ours = log_mel(made, 128)
    assert ours.shape == (128, num_frames(made.num_samples)) == theirs["input_features"][0].shape
    assert int(theirs["attention_mask"].sum()) == ours.shape[1]
    np.testing.assert_allclose(ours, theirs["input_features"][0], atol=2e-4)
    assert np.abs(ours - theirs["input_features"][0]).mean() < 1e-6


def test_silence_has_a_spectrum() -> None:
    assert np.isfinite(log_mel(Sound(bytes(4 * SAMPLE_RATE)), 128)).all()


@pytest.mark.parametrize("samples", [bytes(400), np.full(2000, np.nan, "<f4").tobytes()])
def test_sound_without_a_spectrum_is_refused(samples: bytes) -> None:
    with pytest.raises(ValueError, match="too short, or has values"):
        log_mel(Sound(samples), 128)


def test_sound_has_as_many_tokens_as_the_published_tower_makes() -> None:
    frames = range(1, 1200)
    published = _get_feat_extract_output_lengths(torch.tensor(frames)).tolist()
    assert [sound_tokens(n) for n in frames] == published


def test_images_are_sized_as_published() -> None:
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(1, 5000, (300, 2)).tolist(), [32, 32], [16, 16], [48, 80], [1, 200]]
    for height, width in sizes:
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(ValueError, match="200 times"):
                FACTS.sized(height, width)
            continue
        bounds = {"factor": 32, "min_pixels": FACTS.min_pixels, "max_pixels": FACTS.max_pixels}
        assert FACTS.sized(height, width) == smart_resize(height, width, **bounds)


@pytest.mark.parametrize(
    "broken", [Image(30, 32, bytes(30 * 32 * 3)), Image(32, 32, bytes(5)), Image(0, 32, b"")]
)
def test_pixels_that_do_not_fill_tokens_are_refused(broken: Image) -> None:
    with pytest.raises(ValueError, match=r"not cut|bytes for"):
        patches(broken, FACTS)


def test_equal_media_have_equal_digests_and_no_others() -> None:
    media = [image(8, 16), image(16, 8), image(8, 16, 1), sound(1.0), Sound(image(8, 16).pixels)]
    assert len({medium.digest for medium in media}) == len(media)
    assert image(8, 16).digest == media[0].digest


def _facts(tmp_path: Path, preprocessor: dict[str, Any] | None, family: str = "qwen3_omni_moe") -> MediaFacts:
    checkpoint = write_tiny(family, tmp_path / "checkpoint")
    if preprocessor is not None:
        (checkpoint / PREPROCESSOR_FILE).write_text(json.dumps(preprocessor))
    extract(checkpoint, tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store")
    store.close()
    return read_media_facts(store.manifest, store.root)


def test_bounds_and_colours_are_the_preprocessor_s(tmp_path: Path) -> None:
    facts = _facts(
        tmp_path,
        {"min_pixels": 700, "max_pixels": 5000, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    )
    assert facts.kinds == ("image", "audio")
    assert facts.image == ImageFacts(401, 4, 2, 2, 700, 5000, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_newer_names_of_bounds_are_read_and_the_largest_is_ours(tmp_path: Path) -> None:
    facts = _facts(tmp_path, {"size": {"shortest_edge": 640, "longest_edge": 12_845_056}})
    assert facts.image is not None
    assert (facts.image.min_pixels, facts.image.max_pixels) == (640, MOST_IMAGE_TOKENS * 64)


def test_without_a_preprocessor_the_published_values_hold(tmp_path: Path) -> None:
    facts = _facts(tmp_path, None)
    assert facts.image is not None and facts.image.mean == facts.image.std == (0.5, 0.5, 0.5)


def test_other_families_take_text_alone(tmp_path: Path) -> None:
    assert _facts(tmp_path, {"max_pixels": 5000}, "qwen3_moe").kinds == ()


@pytest.mark.parametrize(
    "preprocessor",
    [{"max_pixels": -1}, {"image_std": [0, 1, 1]}, {"image_mean": "red"}, {"image_mean": [1, 2]}],
)
def test_damaged_preprocessor_is_refused(tmp_path: Path, preprocessor: dict[str, Any]) -> None:
    with pytest.raises(ConfigUnsupported):
        _facts(tmp_path, preprocessor)
    store = ExpertStore.open(tmp_path / "store")
    with pytest.raises(ConfigUnsupported):  # before anything is started
        measure_footprint(store, EngineOptions(has_media=True))
    store.close()
