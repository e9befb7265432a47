"""The whole service in one process, without Ray: the HTTP app over a real engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from experts.store import ExpertStore
from gateway.http.app import build_app
from gateway.http.settings import GatewaySettings
from gateway.routers.client import RouterHealth
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.loading import LoadedEngine
from router.request import GenerationRequest, TokenEvent
from router.service import RouterService


class OneProcessClient:
    """The gateway's client, with a call in place of Serve's handle."""

    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """See RouterClient.generate; one stream a request, since here a stream costs nothing."""
        stream = self._service.events(request.request_id)
        async for _ in stream:
            break
        self._service.submit(request.request_id, request)
        async for events in stream:
            for event in events:
                yield event
                if event.finish_reason is not None:
                    await stream.aclose()
                    return

    async def feedback(self, answer_id: str, score: float) -> bool:
        return self._service.feedback.give(answer_id, score)

    async def health(self) -> RouterHealth:
        health = await self._service.health()
        return RouterHealth(health.is_ready, health.detail)

    async def metrics(self) -> str:
        return ""

    async def status(self) -> dict[str, object]:
        return {}


@asynccontextmanager
async def http_service(
    root: Path,
    loaded: LoadedEngine,
    tokenizer: TextTokenizer,
    template: ChatTemplate | None = None,
    **changes: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app over this engine, which is used by nobody else meanwhile. changes: of the settings."""
    service = RouterService(loaded)
    store = ExpertStore.open(root)
    facts = ("stories", loaded.config.max_position_embeddings, loaded.config.vocab_size, 1)
    settings = replace(GatewaySettings.from_manifest(store.manifest, *facts), **changes)
    store.close()
    template = template or ChatTemplate.from_folder(root, tokenizer)
    app = build_app(settings, tokenizer, template, OneProcessClient(service))
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client
    finally:
        service.engine_thread.stop()
        loaded.engine.allocator.check()
