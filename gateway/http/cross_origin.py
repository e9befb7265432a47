"""Lets web pages of chosen origins call the service (CORS). Called by `gateway.http.app`.

Stands outside the check of keys, so that refusals are readable to pages too, and because browsers send no key when
they ask beforehand whether they may (preflight): that answer says only what is allowed, and reaches no route.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

PREFLIGHT_VALID_S = 600


def allow_cross_origin(app: FastAPI, origins: Sequence[str]) -> None:
    """Cookies are not allowed: a key is sent by the page itself or not at all."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_credentials=False,
        expose_headers=["x-request-id", "retry-after"],
        max_age=PREFLIGHT_VALID_S,
    )
