"""How often is an expert in memory when it is needed, by eviction and share of experts that fit?

Routing is recorded from the bundled model and replayed, token after token and layer after layer, as one sequence in
decode would ask for it, and again in steps of many rows, as prompts do: against caches that all layers share, no
weights are read and no time is measured. Beside the evictions stands Belady's optimum, which knows the future. The text
is what TEXT files hold, or else stories that the model writes itself. Trust is unknown here, so that `trust` is its
recency alone.

Usage: python -m benchmarks.bench_eviction [TEXT ...] [--tokens N] [--rows N ...] [--half-lives N ...] [--keep]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.report import finish
from experts.eviction import EVICTIONS, LFU_HALF_LIFE, FrequencyWorth, Worth, make_worth
from experts.replay import Trace, replay, replay_belady
from experts.store import ExpertStore
from extraction.extract import extract
from extraction.manifest import ExpertKey
from gateway.text.tokenizer import TextTokenizer
from router.dispatch import Dispatch
from router.engine import Engine
from router.loading import EngineOptions, load_engine
from router.request import GenerationRequest, SamplingParams
from router.scoring import Routing
from router.step_routing import GateOutput, RoutingWatcher, SpanOwner

STORIES = Path(__file__).parent.parent / "models" / "stories-moe"
SHARES = (0.125, 0.25, 0.5)
SEQUENCE_TOKENS = 500
STORY_PROMPT = "Once upon a time"


class RoutingRecorder(RoutingWatcher):
    """A `RoutingWatcher` that notes every token's experts."""

    def __init__(self) -> None:
        self._experts: dict[tuple[str, int, int], list[int]] = {}
        """(request, position, layer) -> experts."""

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        row = 0
        chosen = routing.experts_TK.tolist()
        for owner in owners:
            for index in range(owner.count):
                place = (owner.request.request_id, owner.first + index, gate.layer)
                self._experts[place] = chosen[row + index]
            row += owner.count

    def trace(self, component: str, rows: int = 1) -> tuple[Trace, list[int]]:
        """One call for each layer and step of up to `rows` tokens of a sequence, sequence after sequence, and the step
        of each call."""
        needed: dict[tuple[str, int, int], set[int]] = {}
        for (request, position, layer), experts in self._experts.items():
            needed.setdefault((request, position // rows, layer), set()).update(experts)
        trace, steps, num_steps = [], [], 0
        last: tuple[str, int] | None = None
        for request, part, layer in sorted(needed):
            if (request, part) != last:
                num_steps, last = num_steps + 1, (request, part)
            trace.append(
                [ExpertKey(component, layer, expert) for expert in sorted(needed[request, part, layer])]
            )
            steps.append(num_steps)
        return trace, steps


def requests(tokenizer: TextTokenizer, texts: Sequence[Path], num_tokens: int) -> list[GenerationRequest]:
    """Sequences of about `num_tokens` in all: cut from the texts, or to be written by the model."""
    if not texts:
        prompt = tuple(tokenizer.encode(STORY_PROMPT))
        max_tokens = SEQUENCE_TOKENS - len(prompt)
        drawn = [
            SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed)
            for seed in range(-(-num_tokens // SEQUENCE_TOKENS))
        ]
        return [GenerationRequest(f"story-{params.seed:04}", prompt, params) for params in drawn]
    ids = [token for text in texts for token in tokenizer.encode(text.read_text(encoding="utf-8"))]
    parts = range(0, min(num_tokens, len(ids)), SEQUENCE_TOKENS)
    once = SamplingParams(max_tokens=1, temperature=0.0)
    return [GenerationRequest(f"part-{n:08}", tuple(ids[n : n + SEQUENCE_TOKENS]), once) for n in parts]


def run(engine: Engine, wanted: Sequence[GenerationRequest]) -> None:
    for request in wanted:
        while engine.num_waiting:
            engine.step()
        engine.submit(request)
    while engine.has_work:
        engine.step()


def compare(
    trace: Trace, steps: Sequence[int], num_experts: int, half_lives: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Share of experts that fit -> eviction -> hit rate."""
    rates: dict[str, dict[str, float]] = {}
    for share in SHARES:
        capacity = int(num_experts * share)
        worths: dict[str, Worth] = {name: make_worth(name) for name in EVICTIONS}
        found = {name: replay(trace, steps, capacity, worth).hit_rate for name, worth in worths.items()}
        for half_life in half_lives:
            found[f"lfu, half-life {half_life:g}"] = replay(
                trace, steps, capacity, FrequencyWorth(half_life)
            ).hit_rate
        found["belady"] = replay_belady(trace, capacity).hit_rate
        rates[f"{share:.1%}"] = {name: round(rate, 4) for name, rate in found.items()}
        print(f"{share:.1%}: " + ", ".join(f"{name} {rate:.1%}" for name, rate in found.items()), flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 64, 512], help="tokens of a step")
    parser.add_argument("--half-lives", nargs="*", type=float, default=[16, 64, 256, 1024])
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        extract(STORIES, root)
        loaded = load_engine(ExpertStore.open(root), EngineOptions())
        recorder = RoutingRecorder()
        loaded.engine.watchers = (recorder,)
        wanted = requests(TextTokenizer.from_folder(root), arguments.texts, arguments.tokens)
        run(loaded.engine, wanted)
        component = loaded.store.served.name
        num_experts = len(loaded.store.expert_keys(component))
        loaded.close()
    rates = {}
    for rows in arguments.rows:
        trace, steps = recorder.trace(component, rows)
        print(f"steps of {rows} rows: {steps[-1]}", flush=True)
        rates[f"{rows} rows"] = compare(trace, steps, num_experts, arguments.half_lives)
    config = {
        "model": STORIES.name,
        "texts": [text.name for text in arguments.texts] or "written by the model",
        "tokens": arguments.tokens,
        "experts": num_experts,
        "lfu_half_life": LFU_HALF_LIFE,
    }
    finish("bench_eviction", config, {"hit_rates": rates}, is_kept=arguments.keep)


if __name__ == "__main__":
    main()
