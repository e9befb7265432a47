"""A service of a demo's own: `sage-moe serve` as a process, as a user would run it, ended whatever happens.

Used by `gateway.demo.story` and `gateway.demo.kill`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import httpx
from rich.console import Console

from cluster.processes import descendants, end_processes
from extraction.errors import one_line
from gateway.demo.ports import free_port
from gateway.errors import GatewayError
from gateway.http.api_keys import KEYS_VARIABLE, bearer_headers, client_key

MODEL = "stories"
NUM_ACTORS = 2
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
MAX_LOG_CHARS = 4000


class ServiceNotReady(GatewayError):
    """The service ended, or did not become ready in time."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        self.log = log

    def __str__(self) -> str:
        return "the service did not become ready"


@dataclass(frozen=True)
class DemoService:
    """One that answers."""

    url: str
    headers: dict[str, str]

    def status(self) -> dict[str, Any]:
        """Raises httpx.HTTPError."""
        answer = httpx.get(f"{self.url}/sage/status", headers=self.headers, timeout=30.0)
        status: dict[str, Any] = answer.raise_for_status().json()
        return status


def read_arguments(module: str, console: Console) -> tuple[str, str | None] | int:
    """The store and the key that the command line names, or the exit code of one that is wrong, which was told."""
    if len(sys.argv) not in (2, 4) or (len(sys.argv) == 4 and sys.argv[2] != "--api-key"):
        console.print(f"usage: python -m {module} STORE [--api-key KEY|@FILE]", markup=False)
        return 2
    try:
        return sys.argv[1], client_key(sys.argv[3] if len(sys.argv) == 4 else None, os.environ)
    except GatewayError as error:
        console.print(f"error: {one_line(str(error))}", markup=False)
        return 1


@contextmanager
def demo_service(store: str, key: str | None, console: Console) -> Iterator[DemoService]:
    """Started, ready, and stopped at the end; tells how far that is. Raises ServiceNotReady."""
    service = DemoService(f"http://127.0.0.1:{free_port()}", bearer_headers(key))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryFile("w+") as log, _process(store, service.url, key, log) as process:
        started = time.monotonic()
        console.print(
            f"[dim]starting Ray, a router and {NUM_ACTORS} expert actors on {service.url} ...[/dim]"
        )
        if not _wait_ready(service, process):
            log.seek(0)
            raise ServiceNotReady(log.read()[-MAX_LOG_CHARS:])
        console.print(f"[dim]ready after {time.monotonic() - started:.1f} s[/dim]\n")
        yield service


def tell_failure(error: ServiceNotReady, console: Console) -> None:
    console.print(f"[red]{error}; it said:[/red]")
    console.print(error.log, markup=False)


@contextmanager
def _process(store: str, url: str, key: str | None, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """`sage-moe serve` in a session of its own, ended at the end: asked first, then killed with its children."""
    options = {"--port": url.rsplit(":", 1)[1], "--actors": str(NUM_ACTORS), "--served-model-name": MODEL}
    words = [word for option in options.items() for word in option]
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "serve", store, *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
        env=os.environ | ({} if key is None else {KEYS_VARIABLE: key}),
    )
    try:
        yield process
    finally:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop(process)
        signal.signal(signal.SIGINT, previous)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            everything = descendants()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end_processes(everything, grace_s=0.0)


def _wait_ready(service: DemoService, process: subprocess.Popen[str]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{service.url}/ready", headers=service.headers, timeout=10.0).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


def story_body(prompt: str, max_tokens: int, seed: int, **more: object) -> dict[str, object]:
    """Of a request for one story, streamed."""
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "seed": seed, "stream": True}
    return {**asked, "stream_options": {"include_usage": True}, **more}


def stream_events(service: DemoService, body: dict[str, object]) -> Iterator[dict[str, Any]]:
    """The events of a streamed completion. Raises SystemExit where one is an error, httpx.HTTPError."""
    url = f"{service.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=service.headers, timeout=120.0) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(one_line(f"the service answered: {event['error']['message']}"))
            yield event
