"""How long does it take to make a second of speech of its codes, at the published sizes?

Qwen3-Omni's codec decoder with random weights, 216 million of them, as a stream in pieces of some frames (12.5 frames
are a second), against `transformers`' own module with the same weights: all frames in one call, and in pieces of 25
frames with the 25 before them once more, as its `chunked_decode` has it. Seconds of computing for a second of sound;
below 1 it keeps up. Contenders alternate.

Usage: python -m benchmarks.bench_vocoder [--dtype bfloat16] [--threads N] [--frames N] [--rounds N] [--keep]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import finish, spread
from experts.numerics import calibrate
from experts.worker import DTYPES
from router.media.tower_parts import TowerReader
from router.speech.codec_shape import read_codec_shape
from router.speech.codec_weights import CodecReader
from router.speech.vocoder import Vocoder
from router.speech.wish import NUM_CODES, SAMPLE_RATE, SAMPLES_OF_FRAME

PIECES = (1, 8)
CHUNK, CONTEXT = 25, 25
Speak = Callable[[Tensor], object]
"""What is measured, of (frames, NUM_CODES) codes."""


class ModuleReader(TowerReader):
    """Reads weights of a module in place of a store."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._weights: dict[str, Tensor] = module.state_dict()
        self.nbytes = 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._weights[name].float().contiguous()
        assert tuple(tensor.shape) == shape, name
        return tensor


def random_module() -> Any:
    """Float32. Its values stay of a size that speech has."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    torch.manual_seed(0)
    config = configuration.Qwen3OmniMoeCode2WavConfig()
    module: Any = modeling.Qwen3OmniMoeCode2Wav._from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, 0.5 * parameter[0].numel() ** -0.5)
    return module.eval()


def contenders(module: Any, dtype: torch.dtype) -> dict[str, Speak]:
    kernel = calibrate([(64, 64)], dtype)
    vocoder = Vocoder(read_codec_shape({}), CodecReader(ModuleReader(module), kernel, dtype))
    published = module.to(dtype)

    def stream(codes_TQ: Tensor, piece: int) -> None:
        one = vocoder.stream()
        for part in torch.split(codes_TQ, piece):
            vocoder.speak(one, part.tolist())

    @torch.inference_mode()
    def whole(codes_TQ: Tensor) -> object:
        return published(codes_TQ.t()[None])

    @torch.inference_mode()
    def chunked(codes_TQ: Tensor) -> object:
        return published.chunked_decode(codes_TQ.t()[None], CHUNK, CONTEXT)

    ours: dict[str, Speak] = {f"ours, {piece} at a time": partial(stream, piece=piece) for piece in PIECES}
    return ours | {"transformers, one call": whole, f"transformers, {CHUNK} at a time": chunked}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=48, help="of a speech")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = contenders(random_module(), DTYPES[options.dtype])
    codes_TQ = torch.randint(2048, (options.frames, NUM_CODES), generator=torch.Generator().manual_seed(0))
    sound_s = options.frames * SAMPLES_OF_FRAME / SAMPLE_RATE
    samples: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(options.rounds + 1):
        for name, speak in measured.items():
            started = time.perf_counter()
            speak(codes_TQ)
            if number:  # the first round warms up
                samples[name].append((time.perf_counter() - started) / sound_s)
    results = {name: spread(found) for name, found in samples.items()}
    for name, result in results.items():
        print(f"{name:30}: {result['median']:.3f} s for a second of sound")
    config = {key: value for key, value in vars(options).items() if key != "keep"}
    finish("bench_vocoder", config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
