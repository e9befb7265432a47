"""What is encoded, how often, in how much memory, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.store import ExpertStore
from router.errors import ConfigUnsupported, PromptInvalid
from router.footprint import measure_footprint
from router.loading import EngineOptions, LoadedEngine
from router.media.audio_tower import read_audio_shape
from router.media.encoder import KEPT_BYTES, MOST_WORK_BYTES, MediaEncoder
from router.media.items import Image, PlacedMedium, Sound
from router.media.sizes import media_bytes
from router.media.vision_tower import read_vision_shape
from tests.omni import image, request, sound

TEXT = (1, 2, 3)


def _encoder(omni: LoadedEngine, kept_bytes: int = KEPT_BYTES) -> MediaEncoder:
    return MediaEncoder(omni.store, omni.config, omni.kernel, omni.dtype, kept_bytes)


def test_towers_are_read_when_the_first_medium_of_their_kind_comes(omni: LoadedEngine) -> None:
    encoder = _encoder(omni)
    encoder.inputs_for(request(omni, TEXT))
    assert encoder.stats.tower_bytes == 0
    encoder.inputs_for(request(omni, sound(1.0)))
    heard = encoder.stats.tower_bytes
    encoder.inputs_for(request(omni, image(16, 16)))
    parts = {c.name: sum(t.nbytes for t in c.tensors) for c in omni.store.manifest.components}
    assert (heard, encoder.stats.tower_bytes) == (parts["audio"], parts["audio"] + parts["vision"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_footprint_counts_towers_what_is_kept_and_what_is_worked_with(omni_store: Path, dtype: str) -> None:
    store = ExpertStore.open(omni_store)
    options = EngineOptions(dtype=dtype, has_media=True)
    towers = sum(tensor.nbytes for name in ("vision", "audio") for tensor in store.component(name).tensors)
    towers //= 2 if dtype == "bfloat16" else 1
    assert measure_footprint(store, options).media_bytes == towers + KEPT_BYTES + MOST_WORK_BYTES
    assert measure_footprint(store, replace(options, has_media=False)).media_bytes == 0
    store.close()


def test_published_towers_have_their_known_sizes() -> None:
    """Of Qwen3-Omni-30B-A3B, whose index lists them."""
    configs = {"vision": {"out_hidden_size": 2048}, "audio": {"output_dim": 2048}}
    beside = KEPT_BYTES + MOST_WORK_BYTES
    assert media_bytes({"vision": configs["vision"]}, torch.bfloat16) == 1_077_262_816 + beside
    assert media_bytes({"audio": configs["audio"]}, torch.bfloat16) == 1_295_854_336 + beside


def test_equal_media_are_encoded_once(omni: LoadedEngine) -> None:
    encoder = _encoder(omni)
    asked = request(omni, image(16, 24), TEXT, image(16, 24), sound(1.0))
    first = encoder.inputs_for(asked)
    second = encoder.inputs_for(replace(asked, request_id="again"))
    assert (encoder.stats.encoded, encoder.stats.found) == (2, 4)
    assert first.embeddings[0].rows_ND is second.embeddings[1].rows_ND
    assert first.media == second.media


def test_nobody_finds_what_another_has_shown(omni: LoadedEngine) -> None:
    encoder = _encoder(omni)
    asked = [request(omni, image(16, 24), name=name, owner=name) for name in ("a", "b")]
    first, second = map(encoder.inputs_for, asked)
    assert (encoder.stats.encoded, encoder.stats.found) == (2, 0)
    assert torch.equal(first.embeddings[0].rows_ND, second.embeddings[0].rows_ND)


def test_what_was_used_longest_ago_is_forgotten_first_and_encoded_again_alike(omni: LoadedEngine) -> None:
    images = [image(16, 24, seed) for seed in range(3)]
    all_of_them = _encoder(omni)
    kept = all_of_them.inputs_for(request(omni, *images))
    encoder = _encoder(omni, all_of_them.stats.kept_bytes * 2 // 3)
    for medium in (images[0], images[1], images[0], images[2]):
        encoder.inputs_for(request(omni, medium))
        assert encoder.stats.kept_bytes <= all_of_them.stats.kept_bytes * 2 // 3
    assert (encoder.stats.encoded, encoder.stats.found) == (3, 1)
    encoder.inputs_for(request(omni, images[0]))
    assert encoder.stats.encoded == 3
    again = encoder.inputs_for(request(omni, images[1]))
    assert encoder.stats.encoded == 4
    assert torch.equal(again.embeddings[0].rows_ND, kept.embeddings[1].rows_ND)


def test_medium_that_is_larger_than_what_is_kept_is_encoded(omni: LoadedEngine) -> None:
    encoder = _encoder(omni, 10)
    assert encoder.inputs_for(request(omni, image(16, 24))).embeddings[0].rows_ND.shape == (6, 64)
    assert encoder.stats.kept_bytes == 0


def test_choices_of_a_prompt_share_media_that_are_larger_than_what_is_kept(omni: LoadedEngine) -> None:
    encoder = _encoder(omni, 10)
    asked = request(omni, image(16, 24), sound(1.0), TEXT)
    first = encoder.inputs_for(asked)
    assert encoder.inputs_for(replace(asked, request_id="second choice")) is first
    assert (encoder.stats.encoded, encoder.stats.found) == (2, 2)
    for other in (request(omni, image(16, 24, 1), sound(1.0), TEXT), replace(asked, owner="another")):
        assert encoder.inputs_for(other) is not first
    assert encoder.stats.encoded == 6
    del first
    encoder.inputs_for(asked)
    assert encoder.stats.encoded == 8, "nobody had it any more"


@pytest.mark.parametrize("first", [0, 2, 100])
def test_media_where_their_tokens_are_not_are_refused(omni: LoadedEngine, first: int) -> None:
    asked = request(omni, image(16, 24), TEXT)
    moved = replace(asked, media=(PlacedMedium(first, asked.media[0].medium),))
    with pytest.raises(PromptInvalid, match="no 6 tokens of media"):
        _encoder(omni).inputs_for(moved)


def test_two_media_at_one_place_are_refused(omni: LoadedEngine) -> None:
    asked = request(omni, image(16, 24), TEXT)
    with pytest.raises(PromptInvalid):
        _encoder(omni).inputs_for(replace(asked, media=asked.media * 2))


@pytest.mark.parametrize("medium", [Sound(bytes(4 * 200)), Image(16, 24, b"short"), Image(4, 4, bytes(48))])
def test_media_that_no_gateway_makes_are_refused(omni: LoadedEngine, medium: Image | Sound) -> None:
    assert omni.media is not None
    length = omni.media.facts.num_tokens(medium)
    ids = (omni.media.facts.token_id(medium),) * max(1, length)
    asked = replace(request(omni, ids), media=(PlacedMedium(0, medium),))
    with pytest.raises(PromptInvalid):
        _encoder(omni).inputs_for(asked)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu6"},
        {"num_position_embeddings": 15},
        {"deepstack_visual_indexes": [1, 0]},
        {"deepstack_visual_indexes": [0, 3]},
        {"deepstack_visual_indexes": "all"},
        {"num_heads": 3},
        {"depth": 1 << 20},
        {"hidden_size": -1},
    ],
)
def test_vision_configurations_that_are_not_computed_are_refused(
    omni: LoadedEngine, change: dict[str, Any]
) -> None:
    config = omni.store.component("vision").config
    assert read_vision_shape(config).depth == 3
    with pytest.raises(ConfigUnsupported):
        read_vision_shape(config | change)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 15},
        {"encoder_layers": 1 << 20},
        {"n_window_infer": 50},
        {"max_source_positions": 12},
        {"scale_embedding": True},
        {"activation_function": "relu6"},
    ],
)
def test_audio_configurations_that_are_not_computed_are_refused(
    omni: LoadedEngine, change: dict[str, Any]
) -> None:
    config = omni.store.component("audio").config
    assert read_audio_shape(config).encoder_layers == 1
    with pytest.raises(ConfigUnsupported):
        read_audio_shape(config | change)
