"""A router that plays a script, and the app over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fastapi import FastAPI

from gateway.errors import RouterBusy, RouterLost, RouterUnavailable
from gateway.http.app import build_app
from gateway.http.settings import GatewaySettings
from gateway.routers.client import RouterClient, RouterHealth
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.request import FinishReason, GenerationRequest, TokenEvent
from router.speech.facts import CodecIds, SpeechDefaults, SpeechFacts, TurnIds

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
    is_resumable: bool = False
    samples: bytes = b""


@dataclass
class FakeRouter:
    """Plays the same script for every request and records what it was asked."""

    script: Sequence[Step] = ()
    speech_script: Sequence[Step] = ()
    """Of requests for speech."""
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
            for step in self.script if request.speech is None else self.speech_script:
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
                    samples=step.samples,
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


def token_at(request: GenerationRequest, position: int) -> int:
    """What every `MortalRouter` draws: a function of prompt, seed, choice and position."""
    sampling = request.sampling
    return 1 + hash((request.prompt_ids, sampling.seed, sampling.choice, position)) % (VOCAB_SIZE - 1)


class MortalRouter:
    """A router that gives one token an event, and dies, comes back, hangs or refuses when told."""

    def __init__(self, name: str = "router") -> None:
        self.name = name
        self.attempts: list[GenerationRequest] = []
        self.num_given = 0
        self.dies_at: set[int] = set()
        """Counts of tokens given in all its lives, after which it dies."""
        self.refusals_until_back = 1
        """Attempts that a dead one refuses before it lives again; they are counted anew at each death."""
        self.hangs_at: int | None = None
        self.is_full = False
        self.is_ready = True
        self.ending: Step | None = None
        """Ends every request in place of its next token."""
        self.num_open = 0
        self._num_refused: int | None = None
        self._lost = asyncio.Event()

    def kill(self) -> None:
        self._num_refused = 0
        self._lost.set()

    def abandon(self) -> None:
        self._lost.set()
        self._lost = asyncio.Event()

    def _come_back(self) -> None:
        self._num_refused, self._lost = None, asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.attempts.append(request)
        if self._num_refused is not None:
            self._num_refused += 1
            if self._num_refused <= self.refusals_until_back:
                raise RouterUnavailable("it is dead")
            self._come_back()
        if self.is_full:
            raise RouterBusy(1.0)
        self.num_open += 1
        try:
            async with aclosing(self._tokens(request, self._lost)) as events:
                async for event in events:
                    yield event
        finally:
            self.num_open -= 1

    async def _tokens(
        self, request: GenerationRequest, lost: asyncio.Event
    ) -> AsyncGenerator[TokenEvent, None]:
        for position in range(len(request.generated_ids), request.sampling.max_tokens):
            if self.num_given == self.hangs_at:
                self.is_ready = False
                await lost.wait()
            await asyncio.sleep(0)
            if lost.is_set():
                raise RouterLost(f"{self.name} died")
            if self.ending is not None:
                ending = self.ending
                yield TokenEvent(
                    request.request_id,
                    (),
                    ending.finish_reason,
                    ending.error,
                    is_resumable=ending.is_resumable,
                )
                return
            self.num_given += 1
            is_last = position + 1 == request.sampling.max_tokens
            token = token_at(request, position)
            yield TokenEvent(request.request_id, (token,), "length" if is_last else None)
            if self.num_given in self.dies_at:
                self.dies_at.discard(self.num_given)
                self.kill()

    async def feedback(self, answer_id: str, score: float) -> bool:
        self._check()
        return answer_id in {request.answer_id for request in self.attempts}

    async def health(self) -> RouterHealth:
        is_ready = self.is_ready and self._num_refused is None
        return RouterHealth(is_ready, "idle" if is_ready else "it does not answer")

    async def metrics(self) -> str:
        self._check()
        return f"{ROUTER_METRICS}# TYPE sage_moe_own gauge\nsage_moe_own {self.num_given}.0\n"

    async def status(self) -> dict[str, object]:
        self._check()
        requests = {"running": self.num_open, "waiting": 0}
        return {
            "model": MODEL,
            "router": {"pid": len(self.name), "experts": {"name": self.name}},
            "requests": requests,
            "capacity": {"state": "wake", "resident_bytes": len(self.attempts)},
        }

    def _check(self) -> None:
        if self._num_refused is not None:
            raise RouterUnavailable("it is dead")


def settings(**changes: object) -> GatewaySettings:
    facts = {"model_name": MODEL, "created": 1, "context_length": 64, "vocab_size": VOCAB_SIZE}
    return GatewaySettings(**{**facts, "eos_token_ids": (EOS,), **changes})  # type: ignore[arg-type]


def speech_facts(max_frames: int = 8, **voices: int) -> SpeechFacts:
    """Of a model whose prompts have a turn of the assistant where they say "Once upon". voices: names and ids."""
    turn_start, assistant = stories_tokenizer().encode("Once upon")
    turns = TurnIds(turn_start, 2, assistant, 4, 5, 6, frozenset(), frozenset({EOS}))
    codec = CodecIds(64, pad=64, begin=65, end=66, no_thought=67, thought_begin=68, thought_end=69)
    chosen = voices or {"chelsie": 70, "ethan": 71}
    return SpeechFacts(chosen, turns, codec, 0, SpeechDefaults(max_frames=max_frames))


def stories_tokenizer() -> TextTokenizer:
    return TextTokenizer.from_folder(STORIES)


def script(token_ids: Sequence[int], finish_reason: FinishReason = "stop") -> list[Step]:
    """One event a token; "stop" ends with the end-of-text token, as the engine reports it."""
    ids = [*token_ids, EOS] if finish_reason == "stop" else list(token_ids)
    return [Step((token_id,)) for token_id in ids[:-1]] + [Step((ids[-1],), finish_reason)]


def app_over(router: RouterClient, **changes: object) -> FastAPI:
    tokenizer = stories_tokenizer()
    return build_app(settings(**changes), tokenizer, ChatTemplate.from_folder(STORIES, tokenizer), router)


@asynccontextmanager
async def http_client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Raises what the app lets through, which is nothing."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client
