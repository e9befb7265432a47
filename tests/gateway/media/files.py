"""Image and sound files as users send them."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    """Smooth colours with some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
    noise = generator.integers(-10, 10, (height, width, 3))
    return PIL.Image.fromarray((np.asarray(smooth, np.int16) + noise).clip(0, 255).astype(np.uint8))


def image_file(image: PIL.Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tones(seconds: float, rate: int, channels: int = 1) -> NDArray[Any]:
    """(frames, channels) float64, each channel with tones of its own."""
    times = np.arange(int(seconds * rate)) / rate
    hertz = [[220.0 * (1 + channel), 1310.0 + 170.0 * channel] for channel in range(channels)]
    return np.stack([0.3 * np.sin(2 * np.pi * np.outer(times, pair)).sum(axis=1) for pair in hertz], axis=1)


def wav_file(values: NDArray[Any], rate: int, bits: int = 16) -> bytes:
    """values: (frames, channels), -1 to 1."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(values.shape[1])
        out.setframerate(rate)
        out.setsampwidth(bits // 8)
        scaled = np.round(values * (2 ** (bits - 1) - 1)).astype("<i4")
        if bits == 8:
            out.writeframes((scaled + 128).astype(np.uint8).tobytes())
        else:
            out.writeframes(scaled.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes())
    return file.getvalue()


def image_part(content: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part(content: bytes) -> dict[str, Any]:
    data = base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def peak_bytes() -> int:
    """The most memory that this process has had. Not `ru_maxrss`, which begins with what the parent process had."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
