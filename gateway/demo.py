"""`make demo`: starts the service with two expert actors, streams one story over HTTP, prints what it took.

Runs `sage-moe serve` as a process of its own, as a user would, and ends it whatever happens. Prints to the
terminal. Usage: python -m gateway.demo STORE [--api-key KEY|@FILE]; the key may also be in SAGE_MOE_API_KEYS.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import httpx
from rich.console import Console
from rich.table import Table

from cluster.processes import descendants, end_processes
from extraction.errors import one_line
from gateway.api_keys import KEYS_VARIABLE, bearer_headers, client_key
from gateway.errors import GatewayError
from gateway.terminal_text import safe_text

PROMPT = "Once upon a time there was a king who had three daughters, and the youngest"
MAX_TOKENS = 160
SEED = 7
NUM_ACTORS = 2
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


def main() -> int:
    console = Console(highlight=False)
    if len(sys.argv) not in (2, 4) or (len(sys.argv) == 4 and sys.argv[2] != "--api-key"):
        console.print("usage: python -m gateway.demo STORE [--api-key KEY|@FILE]", markup=False)
        return 2
    try:
        key = client_key(sys.argv[3] if len(sys.argv) == 4 else None, os.environ)
    except GatewayError as error:
        console.print(f"error: {one_line(str(error))}", markup=False)
        return 1
    headers = bearer_headers(key)
    url = f"http://127.0.0.1:{_free_port()}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryFile("w+") as log, _service(sys.argv[1], url, key, log) as process:
            started = time.monotonic()
            console.print(f"[dim]starting Ray, a router and {NUM_ACTORS} expert actors on {url} ...[/dim]")
            if not _wait_ready(url, headers, process):
                console.print("[red]the service did not become ready; it said:[/red]")
                log.seek(0)
                console.print(log.read()[-4000:], markup=False)
                return 1
            console.print(f"[dim]ready after {time.monotonic() - started:.1f} s[/dim]\n")
            timings = _stream_story(url, headers)
            answer = httpx.get(f"{url}/sage/status", headers=headers, timeout=30.0)
            status = answer.raise_for_status().json()
            console.print()
            console.print(_table(timings, status))
            console.print(f"exact within numerics class {status['router']['numerics_class']}")
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything was stopped")
        return 130
    return 0


@contextmanager
def _service(store: str, url: str, key: str | None, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """`sage-moe serve` in a session of its own, ended at the end: asked first, then killed with its children."""
    port = url.rsplit(":", 1)[1]
    command = [
        sys.executable,
        "-m",
        "gateway.cli",
        "serve",
        store,
        "--port",
        port,
        "--actors",
        str(NUM_ACTORS),
    ]
    command += ["--served-model-name", "stories"]
    process = subprocess.Popen(
        command,
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(url: str, headers: dict[str, str], process: subprocess.Popen[str]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", headers=headers, timeout=10.0).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


def _stream_story(url: str, headers: dict[str, str]) -> dict[str, float]:
    """Print the completion as it arrives. Returns seconds to the first token, tokens, and tokens per second."""
    body = {
        "model": "stories",
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "seed": SEED,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sys.stdout.write(PROMPT)
    sys.stdout.flush()
    sent = time.perf_counter()
    first = last = 0.0
    usage: dict[str, Any] = {}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=120.0) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(one_line(f"the service answered: {event['error']['message']}"))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                last = time.perf_counter()
                first = first or last
                sys.stdout.write(safe_text(choice["text"]))
                sys.stdout.flush()
    sys.stdout.write("\n")
    tokens = float(usage["completion_tokens"])
    return {"ttft_s": first - sent, "tokens": tokens, "tokens_per_s": (tokens - 1) / max(last - first, 1e-9)}


def _table(timings: dict[str, float], status: dict[str, Any]) -> Table:
    router, actors = status["router"], status["actors"]
    table = Table(title="What it took", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("tokens", f"{timings['tokens']:.0f}")
    table.add_row("time to first token", f"{timings['ttft_s'] * 1000:.0f} ms")
    table.add_row("tokens per second", f"{timings['tokens_per_s']:.1f}")
    table.add_section()
    table.add_row("resident: backbone, in the router", _mib(router["backbone_bytes"]))
    table.add_row("resident: KV cache, in the router", _mib(router["kv_bytes"]))
    for actor in actors:
        label = f"resident: {actor['resident_experts']} experts, in {actor['name']}"
        table.add_row(label, _mib(actor["resident_bytes"]))
    table.add_section()
    used = sum(actor["experts_used"] for actor in actors)
    table.add_row("experts used", f"{used} of {sum(actor['group'] for actor in actors)}")
    table.add_row("expert rows computed by actors", f"{router['expert_calls']['remote_rows']}")
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
