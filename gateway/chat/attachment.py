"""A file that goes with the next message of `sage-moe chat`, as OpenAI's API has it."""

from __future__ import annotations

import base64
from typing import Any

from gateway.errors import ChatFailed
from gateway.media.errors import MediumRefused
from gateway.media.file import read_media_file

MAX_FILE_BYTES = 17 << 20
"""In base64 it just fits a request (docs/media.md)."""
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
"""How an image file begins."""


def read_image(path: str) -> dict[str, Any]:
    """Raises ChatFailed."""
    content = _read(path)
    kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), None)
    if kind is None:
        raise ChatFailed(f"{path} is no PNG, JPEG or WebP image")
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def read_audio(path: str) -> dict[str, Any]:
    """Raises ChatFailed."""
    content = _read(path)
    if not content.startswith(b"RIFF"):
        raise ChatFailed(f"{path} is no WAV file")
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"},
    }


def _read(path: str) -> bytes:
    try:
        return read_media_file(path, MAX_FILE_BYTES)
    except MediumRefused as error:
        raise ChatFailed(f"{path} {error.reason}") from error
