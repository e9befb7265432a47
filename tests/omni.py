"""A tiny Qwen3-Omni twice, published and ours, and media for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from router.loading import LoadedEngine
from router.media.facts import MediaFacts
from router.media.items import SAMPLE_RATE, Image, Medium, PlacedMedium, Sound
from router.request import GenerationRequest, SamplingParams

AUDIO, IMAGE, VIDEO, AUDIO_START, VISION_START, AUDIO_END, VISION_END = range(400, 407)
"""Token ids of `tests.checkpoints`; those that end a medium are no others than text to the model."""
TURN_START, TURN_END, SYSTEM, USER, ASSISTANT = 407, 408, 412, 413, 414
LINE_BREAK = 10
BEFORE_QUESTION = (TURN_START, USER, LINE_BREAK)
AFTER_QUESTION = (TURN_END, LINE_BREAK, TURN_START, ASSISTANT, LINE_BREAK)
"""What the chat template writes around what a user says."""
Part = Medium | Sequence[int]


def image(height: int, width: int, seed: int = 0) -> Image:
    generator = np.random.default_rng(seed)
    return Image(height, width, generator.integers(0, 256, (height, width, 3), np.uint8).tobytes())


def sound(seconds: float, seed: int = 0) -> Sound:
    """A few tones in noise."""
    generator = np.random.default_rng(seed)
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * hertz * times) for hertz in generator.uniform(100, 4000, 3))
    return Sound((0.1 * tones + 0.02 * generator.standard_normal(len(times))).astype("<f4").tobytes())


def prompt(facts: MediaFacts, *parts: Part) -> tuple[tuple[int, ...], tuple[PlacedMedium, ...]]:
    """Token ids, with media among them as a chat template places them."""
    ids: list[int] = []
    placed: list[PlacedMedium] = []
    for part in parts:
        if not isinstance(part, Image | Sound):
            ids += part
            continue
        begin, end = (VISION_START, VISION_END) if isinstance(part, Image) else (AUDIO_START, AUDIO_END)
        placed.append(PlacedMedium(len(ids) + 1, part))
        ids += [begin, *[facts.token_id(part)] * facts.num_tokens(part), end]
    return tuple(ids), tuple(placed)


def request(
    loaded: LoadedEngine, *parts: Part, name: str = "r", max_tokens: int = 12, **options: Any
) -> GenerationRequest:
    assert loaded.media is not None
    ids, placed = prompt(loaded.media.facts, *parts)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerationRequest(name, ids, sampling, media=placed, **options)


@dataclass(frozen=True)
class Published:
    """`transformers`, each image and sound preprocessed alone."""

    model: Any
    """Qwen3OmniMoeThinkerForConditionalGeneration."""

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Published:
        from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

        model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        return cls(model.eval())

    def inputs(self, asked: GenerationRequest) -> dict[str, torch.Tensor]:
        ids = torch.tensor([asked.prompt_ids])
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        images = [placed.medium for placed in asked.media if isinstance(placed.medium, Image)]
        sounds = [placed.medium for placed in asked.media if isinstance(placed.medium, Sound)]
        if images:
            made |= self._pixels(images)
        if sounds:
            made |= _features(sounds)
        return made

    def _pixels(self, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        vision = self.model.config.vision_config
        processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": 1, "longest_edge": 1 << 30},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        arrays = [np.frombuffer(i.pixels, np.uint8).reshape(i.height, i.width, 3) for i in images]
        return dict(processor(arrays, return_tensors="pt"))

    @torch.no_grad()
    def greedy(self, asked: GenerationRequest) -> list[int]:
        inputs = self.inputs(asked)
        answer = self.model.generate(
            **inputs, max_new_tokens=asked.sampling.max_tokens, do_sample=False, eos_token_id=None
        )
        tokens: list[int] = answer[0, len(asked.prompt_ids) :].tolist()
        return tokens


def _features(sounds: Sequence[Sound]) -> dict[str, torch.Tensor]:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
    features = [
        extractor(
            np.frombuffer(one.samples, "<f4"),
            sampling_rate=SAMPLE_RATE,
            padding=True,
            truncation=False,
            return_tensors="pt",
        )["input_features"][0]
        for one in sounds
    ]
    longest = max(feature.shape[1] for feature in features)
    padded = torch.stack([torch.nn.functional.pad(f, (0, longest - f.shape[1])) for f in features])
    mask = torch.stack([torch.arange(longest) < f.shape[1] for f in features]).long()
    return {"input_features": padded, "feature_attention_mask": mask}
