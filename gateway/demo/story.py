"""`make demo`: starts the service with two expert actors, streams one story over HTTP, prints what it took.

Prints to the terminal. Usage: python -m gateway.demo.story STORE [--api-key KEY|@FILE]; the key may also be in
SAGE_MOE_API_KEYS.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.demo.service import (
    DemoService,
    ServiceNotReady,
    demo_service,
    read_arguments,
    story_body,
    stream_events,
    tell_failure,
)
from gateway.text.terminal_text import safe_text

PROMPT = "Once upon a time there was a king who had three daughters, and the youngest"
MAX_TOKENS = 160
SEED = 7


def main() -> int:
    console = Console(highlight=False)
    arguments = read_arguments("gateway.demo.story", console)
    if isinstance(arguments, int):
        return arguments
    try:
        with demo_service(*arguments, console) as service:
            timings = _stream_story(service)
            status = service.status()
            console.print()
            console.print(_table(timings, status))
            console.print(f"exact within numerics class {status['router']['numerics_class']}")
    except ServiceNotReady as error:
        tell_failure(error, console)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything was stopped")
        return 130
    return 0


def _stream_story(service: DemoService) -> dict[str, float]:
    """Print the completion as it arrives. Returns seconds to the first token, tokens, and tokens per second."""
    sys.stdout.write(PROMPT)
    sys.stdout.flush()
    sent = time.perf_counter()
    first = last = 0.0
    usage: dict[str, Any] = {}
    for event in stream_events(service, story_body(PROMPT, MAX_TOKENS, SEED)):
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
