"""`sage-moe status`: what a running service says of itself, once or again and again."""

from __future__ import annotations

import json
import os
import re
from typing import Annotated, Any, Optional

import typer

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 15.0
WATCH_TIMEOUT_S = 6.0
MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""A service has at most 64 actors; more is none."""


def status(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="Where the service answers.")] = DEFAULT_URL,
    is_watched: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")
    ] = False,
    interval_s: Annotated[
        float,
        typer.Option("--interval", min=0.2, max=3600.0, metavar="SECONDS", help="Between two looks."),
    ] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --watch, one a line.")
    ] = False,
    api_key: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(
            metavar="KEY|@FILE",
            help="Key to send, or a file with it; default: the first of SAGE_MOE_API_KEYS.",
        ),
    ] = None,
) -> None:
    """Show actors, nodes and requests of a running service."""
    from rich.console import Console

    from gateway.http.api_keys import bearer_headers, client_key
    from gateway.operations.status_view import render_status
    from gateway.operations.watch import watch

    headers = bearer_headers(client_key(api_key, os.environ))
    console = Console(highlight=False)
    if is_watched:
        watch(lambda: fetch_status(url, headers, WATCH_TIMEOUT_S), url, console, interval_s, as_json)
        return
    answer = fetch_status(url, headers, TIMEOUT_S)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        console.print(render_status(answer))


def fetch_status(url: str, headers: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """A service's answer, once it was seen to be one that can be shown. Raises ServiceUnreachable or ServiceRefuses."""
    import httpx

    from gateway.errors import ServiceRefuses, ServiceUnreachable
    from gateway.operations.status_view import render_status
    from gateway.operations.watch_state import WatchState, answered
    from gateway.operations.watch_view import render_watch

    try:
        with httpx.stream(
            "GET", f"{url.rstrip('/')}/sage/status", headers=headers, timeout=timeout_s
        ) as response:
            if response.status_code == 401:
                raise ServiceRefuses(url)
            content = b""
            for part in response.raise_for_status().iter_bytes():
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    raise ServiceUnreachable(url, "its answer has no end")
        answer: dict[str, Any] = json.loads(content)
        render_status(answer)
        render_watch(answered(WatchState(), answer, 0.0, ""), url, 24, 0.0)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServiceUnreachable(url, _reason(error)) from error
    return answer


def _reason(error: Exception) -> str:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return f"its status answers {error.response.status_code}"
    if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
        return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return f"what answers is no status: {error}"
