"""A router that plays a script, and the app over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fastapi import FastAPI

from gateway.chat_template import ChatTemplate
from gateway.errors import RouterUnavailable
from gateway.http_app import build_app
from gateway.router_client import RouterHealth
from gateway.settings import GatewaySettings
from gateway.tokenizer import TextTokenizer
from router.request import FinishReason, GenerationRequest, TokenEvent

MODEL = "stories"
EOS = 0
VOCAB_SIZE = 4096
STORIES = Path(__file__).parent.parent.parent / "models" / "stories-moe"
ROUTER_METRICS = (
    "# HELP sage_moe_steps_total Steps.\n# TYPE sage_moe_steps_total counter\nsage_moe_steps_total 3.0\n"
)


@dataclass
class Step:
    """One event of a script, or an error in its place, or a wait for ever."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    raises: Exception | None = None
    hangs: bool = False
    is_mixed: bool = False


@dataclass
class FakeRouter:
    """Plays the same script for every request and records what it was asked."""

    script: Sequence[Step] = ()
    is_ready: bool = True
    metrics_text: str | None = ROUTER_METRICS
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    scores: list[tuple[str, float]] = field(default_factory=list)
    is_hanging: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        is_done = False
        try:
            for step in self.script:
                if step.raises is not None:
                    raise step.raises
                if step.hangs:
                    self.is_hanging.set()
                    await asyncio.Event().wait()
                is_done = step.finish_reason is not None
                yield TokenEvent(
                    request.request_id,
                    step.token_ids,
                    step.finish_reason,
                    step.error,
                    is_mixed=step.is_mixed,
                )
        finally:
            if not is_done:
                self.cancelled.append(request.request_id)
                self.was_cancelled.set()

    async def feedback(self, answer_id: str, score: float) -> bool:
        self.scores.append((answer_id, score))
        return answer_id == "known"

    async def health(self) -> RouterHealth:
        return RouterHealth(self.is_ready, "idle" if self.is_ready else "loading")

    async def metrics(self) -> str:
        if self.metrics_text is None:
            raise RouterUnavailable("fake")
        return self.metrics_text

    async def status(self) -> dict[str, object]:
        return {"model": MODEL}


def settings(**changes: object) -> GatewaySettings:
    facts = {"model_name": MODEL, "created": 1, "context_length": 64, "vocab_size": VOCAB_SIZE}
    return GatewaySettings(**{**facts, "eos_token_ids": (EOS,), **changes})  # type: ignore[arg-type]


def stories_tokenizer() -> TextTokenizer:
    return TextTokenizer.from_folder(STORIES)


def script(token_ids: Sequence[int], finish_reason: FinishReason = "stop") -> list[Step]:
    """One event a token; "stop" ends with the end-of-text token, as the engine reports it."""
    ids = [*token_ids, EOS] if finish_reason == "stop" else list(token_ids)
    return [Step((token_id,)) for token_id in ids[:-1]] + [Step((ids[-1],), finish_reason)]


def app_over(router: FakeRouter, **changes: object) -> FastAPI:
    tokenizer = stories_tokenizer()
    return build_app(settings(**changes), tokenizer, ChatTemplate.from_folder(STORIES, tokenizer), router)


@asynccontextmanager
async def http_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Raises what the app lets through, which is nothing."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client
