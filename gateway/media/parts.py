"""The parts of a message that is not text alone, as clients send them: OpenAI's shapes, checked and not decoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic_core import PydanticCustomError

MAX_PARTS = 1024
"""Of one message."""


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    """`image_url`: a data: URL. Its `detail` has no effect: every image has the size that the model is made for."""

    url: str = field(repr=False)

    @property
    def num_chars(self) -> int:
        return len(self.url)


@dataclass(frozen=True)
class AudioPart:
    """`input_audio`."""

    data: str = field(repr=False)
    """Base64."""
    format: str

    @property
    def num_chars(self) -> int:
        return len(self.data)


Part = TextPart | ImagePart | AudioPart
Content = str | tuple[Part, ...]


def read_content(value: object) -> Content:
    """A string, or parts. Those of text alone are joined by line ends. Raises PydanticCustomError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_PARTS:
        raise _refused(f"must be a string or a list of at most {MAX_PARTS} parts")
    parts = tuple(map(_read_part, value))
    if all(isinstance(part, TextPart) for part in parts):
        return "\n".join(part.text for part in parts if isinstance(part, TextPart))
    return parts


def _read_part(value: object) -> Part:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "image_url", "input_audio"):
        raise _refused("parts other than text, image_url and input_audio are not supported yet")
    inner = value.get(str(kind))
    if kind == "text":
        if not isinstance(inner, str):
            raise _refused("a text part must have a string in its field text")
        return TextPart(inner)
    fields = inner if isinstance(inner, dict) else {}
    if kind == "image_url":
        url = fields.get("url")
        if not isinstance(url, str):
            raise _refused("an image_url part must have an object with a string url in its field image_url")
        if fields.get("detail") not in (None, "auto", "low", "high"):
            raise _refused("the detail of an image must be auto, low or high")
        return ImagePart(url)
    data, form = fields.get("data"), fields.get("format")
    if not isinstance(data, str) or not isinstance(form, str):
        raise _refused(
            "an input_audio part must have an object with strings data and format in its field input_audio"
        )
    return AudioPart(data, form)


def _refused(expected: str) -> PydanticCustomError:
    return PydanticCustomError("content", expected)
