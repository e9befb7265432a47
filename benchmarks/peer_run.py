"""What `bench_peers` asks of a contender and what it is told: plain data, and the protocol that all of them keep.

One question serves every measure: generate greedily from some prompts that arrive together. A prompt of 2,048 tokens
and one new token is a prefill, one prompt and many tokens a decode, many prompts are streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generated:
    """One answer for each prompt, and when they came: seconds since all prompts were handed over."""

    tokens: list[list[int]]
    """Empty lists where only their number is known."""
    num_tokens: int
    """Of all answers together."""
    first_s: list[float]
    last_s: list[float]
    note: str = ""
    """How it was computed, where a contender has a choice."""
    text: list[str] = field(default_factory=list)
    """Where tokens are not told."""

    @property
    def prefill_s(self) -> float:
        """Until every prompt has its first token."""
        return max(self.first_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the tokens after the first ones. Only of prompts that get their first tokens together."""
        return (self.num_tokens - len(self.first_s)) / (max(self.last_s) - max(self.first_s))

    @property
    def tokens_per_s(self) -> float:
        """Of everything, prompts included."""
        return self.num_tokens / max(self.last_s)


@dataclass(frozen=True)
class Facts:
    """What a contender says of itself once its weights are loaded."""

    name: str
    version: str
    bytes_per_token: int
    """Weights that one token of one stream reads: attention, gates, its experts, head; without embeddings."""
    head_bytes: int
    """Of these, the head's."""
    setting: dict[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    """A model in memory. Used by one caller, one call after another."""

    def facts(self) -> Facts: ...

    def generate(self, prompts: Prompts, num_tokens: int) -> Generated:
        """Greedy; no token ends an answer."""
        ...

    def top_logprobs(self, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
        """The likeliest tokens after the prompt and their natural log probabilities, best first."""
        ...

    def close(self) -> None: ...


def peak_bytes(process: int | str = "self") -> dict[str, int]:
    """Most memory that a process ever had resident, files that it mapped included, and what it has now without them."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssShmem")}
    return {"peak": kib["VmHWM"] * 1024, "anonymous_now": (kib["RssAnon"] + kib["RssShmem"]) * 1024}
