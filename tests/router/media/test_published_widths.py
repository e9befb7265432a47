"""Towers as wide as the published ones, of few layers and with random weights, against `transformers`.

Tolerance in float32: 1e-5 of the largest value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from experts.numerics import calibrate
from router.media.audio_tower import AudioTower, read_audio_shape
from router.media.tower_parts import TowerReader
from router.media.vision_tower import VisionTower, read_vision_shape

VISION: dict[str, Any] = {"depth": 2, "deepstack_visual_indexes": [0], "out_hidden_size": 2048}
AUDIO: dict[str, Any] = {"encoder_layers": 2, "output_dim": 2048}
TOLERANCE = 1e-5


class FromModule(TowerReader):
    """Reads weights of a module in place of a store."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._weights = module.state_dict()
        self._kernel, self._dtype, self.nbytes = calibrate([(64, 64)], torch.float32), torch.float32, 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights[name]
        assert tuple(tensor.shape) == shape, name
        return tensor.contiguous()


def _filled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            torch.nn.init.normal_(parameter, 0, 0.03 if parameter.dim() > 1 else 0.2)
            if name.endswith("weight") and parameter.dim() == 1:
                parameter.add_(1.0)
    return module.eval()


def _assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.fixture(scope="module")
def vision() -> tuple[Any, VisionTower]:
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    config = configuration.Qwen3OmniMoeVisionEncoderConfig(**VISION)
    module = _filled(modeling.Qwen3OmniMoeVisionEncoder._from_config(config, attn_implementation="eager"))
    return module, VisionTower(read_vision_shape(VISION), FromModule(module))


@pytest.fixture(scope="module")
def audio() -> tuple[Any, AudioTower]:
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    config = configuration.Qwen3OmniMoeAudioEncoderConfig(**AUDIO)
    module = _filled(modeling.Qwen3OmniMoeAudioEncoder._from_config(config, attn_implementation="eager"))
    return module, AudioTower(read_audio_shape(AUDIO), FromModule(module))


@pytest.mark.parametrize("grid", [(15, 20), (24, 7), (1, 1)])
def test_images_are_seen_alike(vision: tuple[Any, VisionTower], grid: tuple[int, int]) -> None:
    module, tower = vision
    patches = torch.randn(4 * grid[0] * grid[1], 1536)
    with torch.no_grad():
        expected = module(patches, torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]))
    seen = tower.see(patches, grid)
    _assert_close(seen.rows_ND, expected.pooler_output)
    _assert_close(seen.deepstack[0], expected.deepstack_features[0])


@pytest.mark.parametrize("frames", [37, 100, 233, 1771])
def test_sound_is_heard_alike(audio: tuple[Any, AudioTower], frames: int) -> None:
    module, tower = audio
    mels = torch.randn(128, frames)
    with torch.no_grad():
        expected = module(mels, feature_lens=torch.tensor([frames])).pooler_output
    _assert_close(tower.hear(mels), expected)
