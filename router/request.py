"""What the engine is asked for and what it answers. Shared by the router and the gateway; plain data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Range checks belong to whoever takes input from outside."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0 means no limit."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """64-bit, unsigned. The noise of a token is a pure function of (seed, choice, position)."""
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with reason "stop" when one of these is drawn; the id itself is reported."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate. Resubmitting with the tokens already sent in `generated_ids` and the same
    seed continues it with the same tokens."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """Progress of one request: the tokens since the last event, and the end if this is it."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Safe to show to a client. Set only when `finish_reason` is "error"."""
