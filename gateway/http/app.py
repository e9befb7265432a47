"""The HTTP app: OpenAI's API and the service's own pages over a router client. Knows nothing of Ray.

A request's way: `request_envelope` (id, headers) -> here (read, check) -> `jobs` (prompt ids, sampling) ->
`completions` (router) -> `connection` (stream, or until the client goes). Built by `gateway.service.gateway_replica`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gateway.errors import ApiError, ClientGone, GatewayError, RouterUnavailable, to_api_error
from gateway.http.body_room import FREE_BYTES, BodyRoom, Hold, no_matter
from gateway.http.completions import answer_events, whole_answer
from gateway.http.connection import EventStream, run_while_connected
from gateway.http.cross_origin import allow_cross_origin
from gateway.http.field_policy import ignored_header
from gateway.http.jobs import Job, check_model, prepare_chat, prepare_completion
from gateway.http.metrics import GatewayMetrics
from gateway.http.openai_types import (
    ChatRequest,
    CompletionRequest,
    RequestT,
    ignored_in,
    read_feedback,
    read_request,
)
from gateway.http.pieces import Backend
from gateway.http.request_envelope import RequestEnvelope
from gateway.http.request_limits import parse_json, read_body
from gateway.http.settings import GatewaySettings, RequestLimits
from gateway.media.decoder import MediaDecoder
from gateway.routers.client import RouterClient
from gateway.text.chat_template import ChatTemplate
from gateway.text.grammar_check import GrammarChecker
from gateway.text.tokenizer import TextTokenizer

__all__ = ["GatewaySettings", "build_app"]

logger = logging.getLogger(__name__)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(
    settings: GatewaySettings, tokenizer: TextTokenizer, template: ChatTemplate, client: RouterClient
) -> FastAPI:
    """The app of one gateway."""
    backend = Backend(client, tokenizer, GatewayMetrics())
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(GatewayError, _answer_gateway_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    _add_generation_routes(app, settings, template, backend, MediaDecoder(settings.media))
    _add_feedback_route(app, settings.limits, backend)
    _add_model_routes(app, settings)
    _add_service_routes(app, backend)
    app.add_middleware(RequestEnvelope, settings=settings, metrics=backend.metrics)
    if settings.cors_origins:
        allow_cross_origin(app, settings.cors_origins)
    return app


def _add_generation_routes(
    app: FastAPI,
    settings: GatewaySettings,
    template: ChatTemplate,
    backend: Backend,
    decoder: MediaDecoder,
) -> None:
    bodies, grammars = BodyRoom(), GrammarChecker()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        owner = request.state.owner
        with bodies.entered(owner) as hold:
            checked, ignored = await _read(CompletionRequest, request, settings.limits, hold)
            preparing = prepare_completion(checked, settings, backend.tokenizer, grammars, owner)
            job = await run_while_connected(request.receive, preparing)
        return await _answer(job, request, backend, ignored)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        job, ignored = await prepared(request)
        return await _answer(job, request, backend, ignored)

    async def prepared(request: Request) -> tuple[Job, list[str]]:
        """Apart, so that the request with its encoded media is not held while the answer comes."""
        owner = request.state.owner
        with bodies.entered(owner) as hold:
            checked, ignored = await _read(ChatRequest, request, settings.limits, hold)
            preparing = prepare_chat(
                checked, settings, backend.tokenizer, template, grammars, decoder, backend.spoken, owner
            )
            return await run_while_connected(request.receive, preparing), ignored


def _add_feedback_route(app: FastAPI, limits: RequestLimits, backend: Backend) -> None:
    small = replace(limits, max_body_bytes=FREE_BYTES)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> JSONResponse:
        checked = read_feedback(await _read_json(request, small))
        if not await backend.client.feedback(checked.request_id, checked.score):
            message = f"There is no recent answer {checked.request_id!r}."
            raise ApiError(404, message, param="request_id", code="answer_not_found")
        return JSONResponse({"object": "feedback", "request_id": checked.request_id, "score": checked.score})


def _add_model_routes(app: FastAPI, settings: GatewaySettings) -> None:
    facts: dict[str, Any] = {
        "object": "model",
        "created": settings.created,
        "owned_by": "sage-moe",
        "input_modalities": ["text", *settings.media.kinds],
        "output_modalities": ["text"] if settings.speech is None else ["text", "audio"],
    }
    if settings.speech is not None:
        facts["voices"] = list(settings.speech.voices)
    cards = {name: {"id": name, **facts} for name in settings.model_names}

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": list(cards.values())})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        check_model(name, settings)
        return JSONResponse(cards[name])


def _add_service_routes(app: FastAPI, backend: Backend) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        state = await backend.client.health()
        return JSONResponse({"ready": state.is_ready, "detail": state.detail}, 200 if state.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        try:
            router_text = await backend.client.metrics()
        except RouterUnavailable as error:
            logger.warning("metrics without the router's: %s", error)
            router_text = ""
        return PlainTextResponse(backend.metrics.render(router_text), media_type=METRICS_TYPE)

    @app.get("/sage/status")
    async def status() -> JSONResponse:
        return JSONResponse(await backend.client.status())


async def _read(
    kind: type[RequestT], request: Request, limits: RequestLimits, hold: Hold
) -> tuple[RequestT, list[str]]:
    """The checked request, and the names of fields without effect."""
    body = await _read_json(request, limits, hold)
    checked = read_request(kind, body)
    return checked, ignored_in(kind, body)


async def _read_json(request: Request, limits: RequestLimits, hold: Hold = no_matter) -> dict[str, Any]:
    try:
        content = await read_body(request.stream(), request.headers.get("content-length"), limits, hold)
    except ClientDisconnect as error:
        raise ClientGone from error
    return parse_json(content, limits)


async def _answer(job: Job, request: Request, backend: Backend, ignored: list[str]) -> Response:
    headers = ignored_header([*ignored, *job.unenforced])
    request_id: str = request.state.request_id
    logger.debug("request %s is generation %s", request_id, job.head.answer_id)
    if job.is_streamed:
        stream = EventStream(answer_events(job, backend), request_id)
        stream.headers.update(headers)
        return stream
    answer = await run_while_connected(request.receive, whole_answer(job, backend))
    return JSONResponse(answer, headers=headers)


async def _answer_gateway_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone) or not isinstance(error, GatewayError):
        raise error
    answer = to_api_error(error)
    if answer.status >= 500:
        logger.warning("request %s: %s", request.state.request_id, error)
    return JSONResponse(answer.body(), answer.status, answer.headers())


async def _answer_http_exception(_request: Request, error: Exception) -> Response:
    """Unknown routes and methods, which the framework finds."""
    if not isinstance(error, HTTPException):
        raise error
    messages: dict[int, str] = {404: "There is no such route.", 405: "The route does not have this method."}
    answer: Any = ApiError(error.status_code, messages.get(error.status_code, "The request was refused."))
    return JSONResponse(answer.body(), answer.status, dict(error.headers or {}))
