"""Images and sound in prompts against `transformers`: features, positions, greedy tokens.

Tolerance of features in float32: 1e-4 of the largest value's size. Tokens are equal.
"""

from __future__ import annotations

import pytest
import torch

from router.loading import LoadedEngine
from router.media.items import Image
from tests.engines import Outcome, small_engine
from tests.omni import Part, Published, image, request, sound

NUM_TOKENS = 64
TEXT = (10, 20, 30, 40, 50)
PROMPTS: dict[str, tuple[Part, ...]] = {
    "image": (TEXT, image(48, 64), TEXT),
    "upright image first": (image(72, 16), TEXT),
    "image last": (TEXT, image(8, 8)),
    "two images": (TEXT, image(24, 40, 1), TEXT, image(32, 32, 2), TEXT),
    "images side by side": (image(16, 16, 1), image(16, 16, 2), TEXT),
    "sound": (TEXT, sound(2.37), TEXT),
    "sound of whole chunks": (TEXT, sound(3.0), TEXT),
    "sound within a chunk": (TEXT, sound(0.41), TEXT),
    "long sound, several windows": (sound(9.3), TEXT),
    "two sounds": (sound(1.2, 1), TEXT, sound(2.9, 2), TEXT),
    "both": (TEXT, image(24, 48), TEXT, sound(1.7), TEXT),
    "both, sound first": (sound(1.1), image(48, 24), TEXT, image(16, 24, 3), TEXT),
}


def answer(loaded: LoadedEngine, *parts: Part) -> Outcome:
    assert loaded.media is not None
    engine = small_engine(loaded, 16)
    asked = request(loaded, *parts, max_tokens=NUM_TOKENS)
    engine.submit(asked, loaded.media.inputs_for(asked))
    while engine.has_work:
        engine.step()
    return engine.outcome


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_those_of_transformers(
    omni: LoadedEngine, published: Published, name: str
) -> None:
    asked = request(omni, *PROMPTS[name], max_tokens=NUM_TOKENS)
    assert answer(omni, *PROMPTS[name]).tokens["r"] == published.greedy(asked)


@pytest.mark.parametrize("name", PROMPTS)
def test_features_and_positions_are_close_to_the_published_ones(
    omni: LoadedEngine, published: Published, name: str
) -> None:
    assert omni.media is not None
    asked = request(omni, *PROMPTS[name])
    ours, theirs = omni.media.inputs_for(asked), published.inputs(asked)
    model = published.model
    images = [placed for placed in asked.media if isinstance(placed.medium, Image)]
    with torch.no_grad():
        if images:
            seen = model.get_image_features(theirs["pixel_values"], theirs["image_grid_thw"])
            rows = [run.rows_ND for run, p in zip(ours.embeddings, asked.media, strict=True) if p in images]
            _assert_close(torch.cat(rows), torch.cat(seen.pooler_output))
            for layer, expected in enumerate(seen.deepstack_features):
                added = torch.cat([run.rows_ND for run in ours.injections[layer]])
                _assert_close(added, torch.cat(list(expected)))
        if len(images) < len(asked.media):
            mask = theirs["feature_attention_mask"]
            heard = model.get_audio_features(theirs["input_features"], feature_attention_mask=mask)
            rows = [
                run.rows_ND for run, p in zip(ours.embeddings, asked.media, strict=True) if p not in images
            ]
            _assert_close(torch.cat(rows), heard.pooler_output)
    expected, _ = model.model.get_rope_index(
        theirs["input_ids"],
        image_grid_thw=theirs.get("image_grid_thw"),
        attention_mask=theirs["attention_mask"],
        audio_seqlens=theirs["feature_attention_mask"].sum(-1)
        if "feature_attention_mask" in theirs
        else None,
    )
    found = ours.positions_3P
    if found is None:
        found = torch.arange(len(asked.prompt_ids)).expand(3, -1)
    assert torch.equal(found, expected[:, 0].long())


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
