"""The tiny Qwen3-Omni that speaks, as `transformers` computes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.speech import PublishedSpeech


@pytest.fixture(scope="session")
def published_speech(omni_checkpoint: Path) -> PublishedSpeech:
    return PublishedSpeech.load(omni_checkpoint)
