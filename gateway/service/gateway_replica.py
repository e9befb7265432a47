"""The Serve shell of the gateway: the HTTP app on its own port, over a handle for every router.

Contains no decision. Imports nothing that brings PyTorch in: the process starts in half the time without. Deployed by
`gateway.service.application`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from extraction.manifest import read_manifest
from gateway.errors import GatewayStopped
from gateway.http.api_keys import NO_KEYS, KeyRing
from gateway.http.app import GatewaySettings, build_app
from gateway.http.routing_rules import NATIVE_ONLY, RoutingRules
from gateway.http.server import HttpServer
from gateway.http.settings import MEDIA_LIMITS, RequestLimits
from gateway.routers.pool import PoolLimits, RouterPool
from gateway.routers.serve_router_client import ServeRouterClient
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.media.facts import NO_MEDIA, read_media_facts
from router.speech.facts import read_speech_facts


@dataclass(frozen=True)
class GatewaySpec:
    """What the gateway needs to know."""

    store_root: str
    model_name: str
    context_length: int
    """Tokens of a prompt and its answer together."""
    vocab_size: int
    max_open_requests: int
    """Of all routers together."""
    address: str
    """Where it listens."""
    port: int
    model_aliases: tuple[str, ...] = ()
    keys: KeyRing = NO_KEYS
    cors_origins: tuple[str, ...] = ()
    routing: RoutingRules = NATIVE_ONLY
    has_media: bool = True
    """Whether images and sound are taken where the model does."""
    has_speech: bool = True
    """Whether answers are spoken where the model does."""
    resume_timeout_s: float = 60.0
    """See `PoolLimits`."""


def build_gateway(spec: GatewaySpec, pool: RouterPool) -> FastAPI:
    """The HTTP app."""
    root = Path(spec.store_root)
    tokenizer = TextTokenizer.from_folder(root)
    facts = (spec.model_name, spec.context_length, spec.vocab_size, int(time.time()))
    manifest = read_manifest(root)
    media = read_media_facts(manifest, root) if spec.has_media else NO_MEDIA
    settings = replace(
        GatewaySettings.from_manifest(manifest, *facts),
        media=media,
        speech=read_speech_facts(manifest) if spec.has_speech else None,
        limits=MEDIA_LIMITS if media.kinds else RequestLimits(),
        model_aliases=spec.model_aliases,
        keys=spec.keys,
        cors_origins=spec.cors_origins,
        routing=spec.routing,
        max_open_requests=spec.max_open_requests,
    )
    template = ChatTemplate.from_folder(root, tokenizer)
    return build_app(settings, tokenizer, template, pool)


class GatewayDeployment:
    """The gateway: the HTTP app on its port."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: GatewaySpec, routers: Sequence[str], *handles: DeploymentHandle[Any]
    ) -> None:
        """routers: names, in the order of their handles."""
        links = {name: ServeRouterClient(handle) for name, handle in zip(routers, handles, strict=True)}
        pool = RouterPool(links, PoolLimits(resume_timeout_s=spec.resume_timeout_s))
        self._server = HttpServer(build_gateway(spec, pool))
        await self._server.start(spec.address, spec.port)

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace the replica."""
        if not self._server.is_serving:
            raise GatewayStopped

    async def __del__(self) -> None:
        """Called by Serve when the replica stops in an orderly way: answers that have begun are finished."""
        server = getattr(self, "_server", None)
        if server is not None:
            await server.stop()
