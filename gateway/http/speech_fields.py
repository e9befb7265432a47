"""The fields of a chat that are about speech, in OpenAI's shapes. Called by `gateway.http.openai_types`.

Whether the model speaks, and with which voices, is checked by `gateway.http.speech`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Modality = Literal["text", "audio"]
AudioFormat = Literal["wav", "pcm16"]
MAX_TRANSCRIPT_CHARS = 1 << 20


class AudioOptions(BaseModel):
    """`audio` of a request: how its answer is spoken."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    voice: str | None = Field(None, min_length=1, max_length=64, description="the name of a voice")
    format: AudioFormat | None = Field(None, description="wav or pcm16; others are not supported")


class SpokenTurn(BaseModel):
    """`audio` of a message by the assistant: an earlier answer that was spoken, as a client has kept it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    id: str = Field(min_length=1, max_length=128)
    transcript: str | None = Field(None, max_length=MAX_TRANSCRIPT_CHARS)
