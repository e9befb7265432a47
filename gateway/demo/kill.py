"""`make demo-kill`: the same story twice from a running service; in the middle of the second an expert actor is killed.

Prints the story as it arrives, then whether its tokens are those of the first, how long the reader waited, who computed
the lost experts meanwhile, and when the replacement was there. Exit code 1 where a token differs. Usage:
python -m gateway.demo.kill STORE [--api-key KEY|@FILE]; the key may also be in SAGE_MOE_API_KEYS.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from gateway.demo.service import (
    NUM_ACTORS,
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
KILL_AT_TOKEN = 60
SEED = 7
LOOK_S = 0.25
REPLACEMENT_TIMEOUT_S = 120.0


@dataclass
class Story:
    """An answer as a reader gets it."""

    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    came_at_s: list[float] = field(default_factory=list)
    """Of each event with tokens, on the monotonic clock."""

    def add(self, event: dict[str, Any]) -> str:
        """Take in an event. Returns its text."""
        text = ""
        for choice in event["choices"]:
            text += choice["text"]
            if choice["logprobs"] is not None and choice["logprobs"]["tokens"]:
                self.tokens += choice["logprobs"]["tokens"]
                self.logprobs += choice["logprobs"]["token_logprobs"]
                self.came_at_s.append(time.monotonic())
        return text

    def digest(self) -> str:
        """SHA-256 of all tokens, and of their logprobs to the last bit."""
        return hashlib.sha256(json.dumps([self.tokens, self.logprobs]).encode()).hexdigest()

    def gaps_s(self) -> list[float]:
        """Between one event with tokens and the next."""
        return [after - before for before, after in zip(self.came_at_s, self.came_at_s[1:], strict=False)]


@dataclass
class Loss:
    """A killed actor, and what came of it."""

    name: str
    pid: int
    num_experts: int
    at_token: int
    killed_at_s: float
    num_computed_here: int = 0
    """Experts that the router's own process has computed since."""
    failovers: int = 0
    replaced_after_s: float | None = None
    new_pid: int | None = None


def main() -> int:
    console = Console(highlight=False)
    arguments = read_arguments("gateway.demo.kill", console)
    if isinstance(arguments, int):
        return arguments
    try:
        with demo_service(*arguments, console) as service:
            return _run(service, console)
    except ServiceNotReady as error:
        tell_failure(error, console)
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted; everything was stopped")
        return 130


def _run(service: DemoService, console: Console) -> int:
    console.print("[dim]the story undisturbed, unseen ...[/dim]\n")
    undisturbed = _read(service, lambda text, story: None)
    watcher = _Watcher(service, service.status())
    sys.stdout.write(PROMPT)

    def show(text: str, story: Story) -> None:
        sys.stdout.write(safe_text(text))
        sys.stdout.flush()
        if len(story.tokens) >= KILL_AT_TOKEN and watcher.loss is None:
            watcher.kill(len(story.tokens))
            console.print(f"[bold red] ✂ {watcher.lost} [/bold red]", end="")

    disturbed = _read(service, show)
    console.print("\n\n[dim]waiting for the replacement ...[/dim]")
    loss = watcher.result()
    console.print()
    console.print(_table(undisturbed, disturbed, loss))
    is_same = undisturbed.digest() == disturbed.digest()
    console.print(
        "[green]the same answer, token for token and logprob for logprob[/green]"
        if is_same
        else "[red]THE ANSWERS DIFFER[/red]"
    )
    return 0 if is_same and loss.new_pid is not None else 1


def _read(service: DemoService, show: Callable[[str, Story], None]) -> Story:
    story = Story()
    for event in stream_events(service, story_body(PROMPT, MAX_TOKENS, SEED, logprobs=0)):
        show(story.add(event), story)
    return story


class _Watcher:
    """Kills one of the actors that a status names, and looks from then on who takes its place."""

    def __init__(self, service: DemoService, before: dict[str, Any]) -> None:
        self._service, self._before = service, before
        self.loss: Loss | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def lost(self) -> str:
        assert self.loss is not None
        return f"{self.loss.name}, process {self.loss.pid}, was killed"

    def kill(self, at_token: int) -> None:
        victim = self._before["actors"][-1]
        self.loss = Loss(victim["name"], victim["pid"], victim["group"], at_token, time.monotonic())
        os.kill(victim["pid"], signal.SIGKILL)
        self._thread.start()

    def result(self) -> Loss:
        """Once the replacement is there, or will not come."""
        self._thread.join()
        assert self.loss is not None, "the story was too short"
        return self.loss

    def _watch(self) -> None:
        loss = self.loss
        assert loss is not None
        while loss.new_pid is None and time.monotonic() - loss.killed_at_s < REPLACEMENT_TIMEOUT_S:
            time.sleep(LOOK_S)
            try:
                self._take_in(loss, self._service.status())
            except httpx.HTTPError:
                continue  # asked again

    def _take_in(self, loss: Loss, status: dict[str, Any]) -> None:
        router, before = status["router"], self._before["router"]
        loss.num_computed_here = router["experts"]["experts_used"] - before["experts"]["experts_used"]
        loss.failovers = router["expert_calls"]["failovers"] - before["expert_calls"]["failovers"]
        known = {actor["pid"] for actor in self._before["actors"]}
        new = [a for a in status["actors"] if a["state"] == "ready" and a.get("pid") not in (None, *known)]
        if new and router["connected_actors"] == NUM_ACTORS:
            loss.new_pid, loss.replaced_after_s = new[0]["pid"], time.monotonic() - loss.killed_at_s


def _table(undisturbed: Story, disturbed: Story, loss: Loss) -> Table:
    table = Table(title="What a death cost", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("tokens, undisturbed", f"{len(undisturbed.tokens)}, sha256 {undisturbed.digest()[:16]}")
    table.add_row("tokens, with a kill", f"{len(disturbed.tokens)}, sha256 {disturbed.digest()[:16]}")
    table.add_section()
    table.add_row("killed, at token", f"{loss.at_token}")
    table.add_row("calls that failed over", f"{loss.failovers}")
    table.add_row(
        "experts recovered by the router", f"{loss.num_computed_here} of {loss.num_experts} that were lost"
    )
    table.add_section()
    gaps_s = disturbed.gaps_s()
    table.add_row("longest gap between tokens", f"{max(gaps_s) * 1000:.0f} ms")
    table.add_row("usual gap", f"{statistics.median(gaps_s) * 1000:.0f} ms")
    table.add_row("longest gap, undisturbed", f"{max(undisturbed.gaps_s()) * 1000:.0f} ms")
    came = "not in time" if loss.replaced_after_s is None else f"{loss.replaced_after_s:.1f} s after the kill"
    table.add_row("replacement ready", came)
    return table


if __name__ == "__main__":
    sys.exit(main())
