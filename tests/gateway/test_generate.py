"""One generation without Ray, of a store whose served decoder is one of several components."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from extraction.extract import extract
from gateway.errors import OptionInvalid
from gateway.local.generate import Generation, generate
from gateway.local.media_prompt import MediaFiles
from gateway.media.decoder import MediaDecoder
from router.loading import EngineOptions, LoadedEngine
from tests.checkpoints import write_tiny
from tests.gateway.media.files import image_file, picture, tones, wav_file
from tests.omni import AFTER_QUESTION, BEFORE_QUESTION, Published, request
from tests.reference import load_published


def test_omni_answers_with_its_thinker(tmp_path: Path) -> None:
    checkpoint = write_tiny("qwen3_omni_moe", tmp_path / "checkpoint")
    extract(checkpoint, tmp_path / "store", index_only=True)
    answer = generate(
        tmp_path / "store",
        "Hello",
        {"max_tokens": 8, "temperature": 0.0},
        EngineOptions(kv_budget_bytes=1 << 24),
    )
    prompt = list(b"Hello")
    assert len(answer.token_ids) == 8
    published = load_published(checkpoint)
    with torch.no_grad():
        out = published.generate(
            torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert out[0, len(prompt) :].tolist() == list(answer.token_ids)


def _generate(store: Path, text: str, *images: Path, sounds: tuple[Path, ...] = ()) -> Generation:
    return generate(
        store,
        text,
        {"max_tokens": 8, "temperature": 0.0},
        EngineOptions(kv_budget_bytes=1 << 24),
        files=MediaFiles(images, sounds),
    )


def test_files_of_images_and_sound_come_before_the_prompt(
    omni_store: Path, omni: LoadedEngine, published: Published, tmp_path: Path
) -> None:
    seen, heard = tmp_path / "seen.png", tmp_path / "heard.wav"
    seen.write_bytes(image_file(picture(40, 24)))
    heard.write_bytes(wav_file(tones(0.7, 44_100, 2), 44_100))
    answer = _generate(omni_store, "What?", seen, sounds=(heard,))
    assert omni.media is not None
    decoder = MediaDecoder(omni.media.facts)
    media = decoder.image(seen.read_bytes()), decoder.sound(heard.read_bytes())
    asked = request(omni, BEFORE_QUESTION, *media, (*b"What?", *AFTER_QUESTION), max_tokens=8)
    assert answer.prompt_token_ids == asked.prompt_ids
    assert list(answer.token_ids) == published.greedy(asked)[: len(answer.token_ids)]
    assert answer.resident_bytes["media"] > 0


def test_files_that_cannot_be_used_are_named(omni_store: Path, stories_store: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen.png"
    with pytest.raises(OptionInvalid, match=r"image .*seen.png cannot be read: No such file"):
        _generate(omni_store, "What?", seen)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OptionInvalid, match=r"image .*pipe.png is no regular file"):
        _generate(omni_store, "What?", tmp_path / "pipe.png")
    seen.write_bytes(b"text")
    with pytest.raises(OptionInvalid, match=r"image .*seen.png is no image of a known format"):
        _generate(omni_store, "What?", seen)
    with pytest.raises(OptionInvalid, match=r"audio .*seen.png is no WAV file"):
        _generate(omni_store, "What?", sounds=(seen,))
    with pytest.raises(OptionInvalid, match=r"seen.png is an image, and none are taken here"):
        _generate(stories_store, "What?", seen)
