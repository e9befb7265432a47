"""The codec's decoder against `transformers`, and against itself in other pieces.

Tolerance in float32: 1e-5 of full scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.native_products import TORCH, VARIABLE
from experts.numerics import RowKernel, calibrate, computing_threads
from experts.store import ExpertStore
from router.errors import ConfigUnsupported
from router.media.tower_parts import TowerReader
from router.speech.codec_shape import read_codec_shape
from router.speech.codec_weights import CodecReader
from router.speech.vocoder import Vocoder
from router.speech.wish import NUM_CODES, SAMPLES_OF_FRAME

SMALL: dict[str, Any] = {
    "codebook_size": 32,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "sliding_window": 6,
    "decoder_dim": 48,
}
PUBLISHED: dict[str, Any] = {"num_hidden_layers": 1, "codebook_size": 64}
CUTS = {"one by one": [1] * 40, "uneven": [3, 1, 8, 2, 6, 8, 5, 7], "in large pieces": [8] * 5}


class FromModule(TowerReader):
    """Reads weights of a module in place of a store."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._weights, self.nbytes = module.state_dict(), 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights[name].float()
        assert tuple(tensor.shape) == shape, name
        return tensor.contiguous()


def published(options: dict[str, Any], spread: float) -> Any:
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    config = configuration.Qwen3OmniMoeCode2WavConfig(**options)
    module = modeling.Qwen3OmniMoeCode2Wav._from_config(config, attn_implementation="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            inputs = parameter[0].numel() if parameter.dim() > 1 else 1
            torch.nn.init.normal_(parameter, 0, spread if parameter.dim() == 1 else 0.5 * inputs**-0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
        module.code_embedding.weight.mul_(20.0)
    return module.eval()


def vocoder_of(module: Any, options: dict[str, Any], dtype: torch.dtype, kernel: RowKernel) -> Vocoder:
    return Vocoder(read_codec_shape(options), CodecReader(FromModule(module), kernel, dtype))


def kernel_of(dtype: torch.dtype) -> RowKernel:
    return calibrate([(64, 64)], dtype)


def codes(num_frames: int, codebook: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(codebook, (num_frames, NUM_CODES), generator=generator).tolist()
    return found


def spoken(vocoder: Vocoder, frames: list[list[int]], cuts: list[int]) -> Tensor:
    stream, parts = vocoder.stream(), []
    for piece in torch.split(torch.tensor(frames), cuts):
        parts.append(vocoder.waveform(stream, piece))
    return torch.cat(parts)


def expected_of(module: Any, frames: list[list[int]]) -> Tensor:
    with torch.no_grad():
        wave: Tensor = module(torch.tensor(frames).t()[None])
    return wave[0, 0]


@pytest.fixture(scope="module")
def small() -> Any:
    return published(SMALL, 0.2)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 40])
def test_samples_equal_one_call_of_the_published_decoder(small: Any, num_frames: int) -> None:
    vocoder = vocoder_of(small, SMALL, torch.float32, kernel_of(torch.float32))
    frames = codes(num_frames, SMALL["codebook_size"])
    found = spoken(vocoder, frames, [1] * num_frames)
    expected = expected_of(small, frames)
    assert len(found) == len(expected) == SAMPLES_OF_FRAME * num_frames - 555
    assert len(found) == vocoder.shape.num_samples(num_frames)
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() < 1e-5


def test_published_widths_equal_the_published_decoder() -> None:
    module = published(PUBLISHED, 0.2)
    vocoder = vocoder_of(module, PUBLISHED, torch.float32, kernel_of(torch.float32))
    frames = codes(5, PUBLISHED["codebook_size"])
    expected = expected_of(module, frames)
    assert expected.abs().max() > 0.05
    assert (spoken(vocoder, frames, [2, 3]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", CUTS)
def test_any_pieces_give_the_same_bits(small: Any, cuts: str, dtype: torch.dtype) -> None:
    vocoder = vocoder_of(small, SMALL, dtype, kernel_of(dtype))
    frames = codes(40, SMALL["codebook_size"])
    whole = vocoder.speak(vocoder.stream(), frames)
    stream, parts = vocoder.stream(), b""
    for piece in torch.split(torch.tensor(frames), CUTS[cuts]):
        parts += vocoder.speak(stream, piece.tolist())
    assert parts == whole
    assert len(set(whole)) > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_same_bits_with_a_librarys_products(
    omni_store: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)
    store = ExpertStore.open(omni_store)
    vocoder = Vocoder.open(store, kernel_of(dtype), dtype)
    store.close()
    frames = codes(40, vocoder.shape.codebook_size)
    uneven, large = (spoken(vocoder, frames, CUTS[name]) for name in ("uneven", "in large pieces"))
    assert torch.equal(uneven, large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_behind_the_lookback_sound_alike_without_those_before_it(
    small: Any, dtype: torch.dtype
) -> None:
    vocoder = vocoder_of(small, SMALL, dtype, kernel_of(dtype))
    frames, lookback = codes(90, SMALL["codebook_size"]), vocoder.shape.lookback
    whole = vocoder.speak(vocoder.stream(), frames)
    assert 15 < lookback < 25
    for first in (1, 63):
        stream = vocoder.stream(first)
        vocoder.speak(stream, frames[first : first + lookback])
        rest = vocoder.speak(stream, frames[first + lookback :])
        assert rest == whole[-len(rest) :]
        assert len(rest) == 2 * SAMPLES_OF_FRAME * (90 - first - lookback)


def test_number_of_threads_changes_no_bit(small: Any) -> None:
    vocoder = vocoder_of(small, SMALL, torch.bfloat16, kernel_of(torch.bfloat16))
    frames = codes(24, SMALL["codebook_size"])
    found = []
    for num_threads in (1, 2, 3):
        with computing_threads(num_threads):
            found.append(vocoder.speak(vocoder.stream(), frames))
    assert found[0] == found[1] == found[2]


def test_streams_of_one_vocoder_do_not_mix(small: Any) -> None:
    vocoder = vocoder_of(small, SMALL, torch.float32, kernel_of(torch.float32))
    frames = [codes(12, SMALL["codebook_size"], seed) for seed in (1, 2)]
    alone = [vocoder.speak(vocoder.stream(), part) for part in frames]
    streams, beside = [vocoder.stream(), vocoder.stream()], [b"", b""]
    for first in range(0, 12, 4):
        for i in (0, 1):
            beside[i] += vocoder.speak(streams[i], frames[i][first : first + 4])
    assert beside == alone


def test_bfloat16_is_near_float32(small: Any) -> None:
    frames = codes(12, SMALL["codebook_size"])
    exact, rounded = (
        spoken(vocoder_of(small, SMALL, dtype, kernel_of(dtype)), frames, [6, 6])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_code_outside_the_codebook_is_refused(small: Any) -> None:
    vocoder = vocoder_of(small, SMALL, torch.float32, kernel_of(torch.float32))
    with pytest.raises(IndexError, match="codebook of 32"):
        vocoder.speak(vocoder.stream(), [[0] * 15 + [32]])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_quantizers", 8),
        ("upsample_rates", [8, 5, 4]),
        ("upsampling_ratios", [4.0]),
        ("decoder_dim", 100),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", -1.0),
        ("sliding_window", 1 << 20),
        ("num_key_value_heads", 3),
    ],
)
def test_configuration_that_is_not_computed_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigUnsupported):
        read_codec_shape({**SMALL, key: value})


def test_left_out_keys_are_those_of_the_published_model() -> None:
    shape = read_codec_shape({})
    assert (shape.decoder.num_layers, shape.window, shape.channels(4)) == (8, 72, 96)
    assert 568 < shape.lookback < 580
