"""A cluster's head as far as anybody asks it who has not joined: gRPC, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from cluster.head_probe import CHECK_ALIVE, READ_VALUE

METADATA = b'\x12\x38{"ray_version": "2.60.0", "python_version": "3.10.1"}'
"""Ray's answer with its versions."""


class FakeHead(grpc.GenericRpcHandler):
    """Ray's two calls; a token of None lets everybody in. seen: what every call showed."""

    def __init__(self, token: str | None) -> None:
        self._token = token
        self.seen: list[str | None] = []

    def service(self, details: Any) -> Any:
        if details.method not in (CHECK_ALIVE, READ_VALUE):
            return None
        shown = dict(details.invocation_metadata).get("authorization")
        self.seen.append(shown)
        return grpc.unary_unary_rpc_method_handler(
            lambda _, context: self._answer(details.method, shown, context)
        )

    def _answer(self, method: str, shown: str | None, context: Any) -> bytes:
        if self._token is not None and shown != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return METADATA if method == READ_VALUE else b""


@contextmanager
def listening(handler: grpc.GenericRpcHandler) -> Iterator[str]:
    """Yields the address."""
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)
