"""What surrounds every HTTP request: an id, the limit on headers, the key, the number of open requests, the time it may
take, the count, and an answer to unexpected errors. All checks happen before anything of the body is read."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ApiError, ClientGone
from gateway.http.admission import Admission
from gateway.http.api_keys import check_key
from gateway.http.connection import describe_bug
from gateway.http.metrics import GatewayMetrics
from gateway.http.request_limits import check_headers
from gateway.http.settings import GatewaySettings

logger = logging.getLogger(__name__)

SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
STATUS_CLIENT_GONE = 499
"""nginx's number; it is counted, nobody receives it."""
POLICY_VIOLATION = 1008


class RequestEnvelope:
    """ASGI middleware around the app. Sets `request_id` and `owner` in the scope's state."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._admission = Admission(settings.max_open_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # there is no such route
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        status, is_whole = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._metrics.in_flight.inc()
        try:
            check_headers(scope, self._settings.limits)
            scope["state"]["owner"] = check_key(scope, self._settings.keys)
            with self._admission.entered(scope["method"]):
                await self._run_in_time(scope, receive, send_with_id)
            if not is_whole:  # an answer ends early without an error only where nobody reads it
                raise ClientGone
        except ApiError as error:
            if not status:  # else too late for an answer; the server closes the connection
                await _answer(error, scope, receive, send_with_id)
        except ClientGone:
            status = STATUS_CLIENT_GONE
            logger.debug("the client of request %s has gone", request_id)
        except Exception as error:  # noqa: BLE001 - logged; the last place that can answer
            logger.error("request %s failed: %s", request_id, describe_bug(error))
            if status:
                return  # as above
            text = f"Internal error; the request's id is {request_id}."
            await _answer(
                ApiError(500, text, "server_error", None, "internal_error"), scope, receive, send_with_id
            )
        finally:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(_route(scope), str(status or STATUS_CLIENT_GONE)).inc()

    async def _run_in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._settings.request_timeout_s) as limit:
                await self._app(scope, receive, send)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ApiError(408, "The request took too long.", code="timeout") from error


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's, where it is safe to log and to repeat, else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The route's pattern, so that the number of labels is bounded."""
    return str(getattr(scope.get("route"), "path", "unknown"))
