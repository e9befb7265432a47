"""Open-loop load on a running service of this machine: requests arrive whether others are done or not.

A closed loop waits for answers before it asks again and so hides how long people queue; here arrivals are a Poisson
process of a given rate. Bounded in requests and time, loopback only. Reports, over the requests that were counted,
percentiles of the time to the first token, between events and to the end, the tokens a second, and what was refused.

Usage: python -m benchmarks.open_loop --port 8000 --rates 1 2 4 [--seconds 20] [--prompt-file FILE] [--keep]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.report import finish
from benchmarks.sse_client import Answer, RequestFailed, check_loopback, stream_completion

MAX_REQUESTS = 2000
MAX_SECONDS = 300.0
DRAIN_S = 120.0
"""How long open requests may take after the last arrival."""
PERCENTILES = (50, 90, 99)
PROMPT = "Once upon a time there was a"


@dataclass(frozen=True)
class Load:
    """What is sent."""

    rate: float
    """Requests a second, on average."""
    seconds: float
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        """Raises ValueError for what is out of bounds."""
        if not self.rate > 0 or not 0 < self.seconds <= MAX_SECONDS or self.max_tokens < 1:
            raise ValueError(f"a rate above 0, at most {MAX_SECONDS:.0f} seconds and at least one token")
        if self.rate * self.seconds > MAX_REQUESTS:
            raise ValueError(f"more than {MAX_REQUESTS} requests; lower the rate or the time")


@dataclass
class Outcome:
    """What came back."""

    answers: list[Answer] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """By what the service said."""
    seconds: float = 0.0
    """From the first arrival to the last answer."""


def arrivals(load: Load) -> Iterator[float]:
    """Seconds from the start, of a Poisson process; the same ones for the same load."""
    source = random.Random(load.seed)
    at = source.expovariate(load.rate)
    count = 0
    while at < load.seconds and count < MAX_REQUESTS:
        yield at
        at += source.expovariate(load.rate)
        count += 1


async def run_load(host: str, port: int, model: str, prompt: str, load: Load) -> Outcome:
    """Raises NotLoopback. A refusal is counted, not raised."""
    check_loopback(host)
    outcome = Outcome()
    body = {"model": model, "prompt": prompt, "max_tokens": load.max_tokens, "ignore_eos": True}

    async def one(number: int, after_s: float) -> None:
        await asyncio.sleep(max(0.0, started + after_s - perf_counter()))
        try:
            seeded = {**body, "seed": number}
            outcome.answers.append(await stream_completion(host, port, seeded))
        except RequestFailed as error:
            outcome.refused[f"HTTP {error.status}"] += 1
        except (OSError, EOFError) as error:
            outcome.refused[type(error).__name__] += 1

    started = perf_counter()
    async with asyncio.timeout(load.seconds + DRAIN_S):
        await asyncio.gather(*(one(number, at) for number, at in enumerate(arrivals(load))))
    outcome.seconds = perf_counter() - started
    return outcome


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Percentiles in milliseconds."""
    answers = outcome.answers
    between = [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.event_at, answer.event_at[1:], strict=False)
    ]
    return {
        "answered": len(answers),
        "refused": dict(outcome.refused),
        "tokens_per_s": sum(answer.num_tokens for answer in answers) / outcome.seconds,
        "first_token_ms": percentiles([answer.first_s for answer in answers]),
        "between_events_ms": percentiles(between),
        "answer_ms": percentiles([answer.last_s for answer in answers]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds, by interpolation; empty where there are no samples."""
    if not seconds:
        return {}
    if len(seconds) == 1:
        return {f"p{rank}": 1e3 * seconds[0] for rank in PERCENTILES}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{rank}": 1e3 * cuts[rank - 1] for rank in PERCENTILES}


def main() -> None:
    options = _options()
    prompt = options.prompt_file.read_text()[:2000] if options.prompt_file is not None else PROMPT
    results = {}
    for rate in options.rates:
        load = Load(rate, options.seconds, options.max_tokens, options.seed)
        outcome = asyncio.run(run_load(options.host, options.port, options.model, prompt, load))
        results[f"{rate:g} requests/s"] = figures = summarise(outcome)
        print(f"{rate:g} requests/s: {figures}", flush=True)
    config = {
        "model": options.model,
        "seconds": options.seconds,
        "max_tokens": options.max_tokens,
        "arrivals": "Poisson",
        "seed": options.seed,
    }
    label = f"_{options.label}" if options.label else ""
    finish(f"open_loop{label}", config, results, is_kept=options.keep)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="a literal address of this machine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="stories")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, for each rate")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="added to the name of the kept result")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
