"""What does it cost that experts live in other processes, and what does a reader see when one of them is killed?

One machine, one model: an engine that computes its experts itself, and engines whose experts 1, 2 and 4 actors compute,
each a process of its own behind the real data plane (without Ray, which no token passes). All are alive at once, and
take turns with the same prompts:
- decoding tokens/s with 1 and 16 streams, each round against the engine of that round that has all in one process;
- messages and bytes for each token and layer;
- the longest step of a running stream while a long prompt is computed beside it, in steps of the same stream alone;
- the stall of a stream when the actor that it needs is killed (SIGKILL), with a replica and without one, against C, the
  time from an actor's start until it takes calls;
- tokens/s of 16 streams with two replicas, and when one of them is dead.

`--parts` takes some of these; another store's result is kept under that store's name, and one of some parts under
`--name`, so that each can be taken alone on a machine that is busy at times.

Usage: python -m benchmarks.bench_cluster [--store NAME] [--rounds N] [--tokens N] [--kills N] [--parts ...] [--keep]
       [--name NAME]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.actor_process import SECRET, ActorProcess, actor_spec
from benchmarks.report import finish, spread
from cluster.placement import split_experts
from cluster.resources import plan_spin_s, plan_threads
from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.connection import ExpertConnection
from experts.cores import num_cores
from experts.directory import LocalDirectory
from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from gateway.stores.source import resolve_store
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.model_config import read_model_config
from router.request import GenerationRequest, SamplingParams

ACTORS = (1, 2, 4)
STREAMS = (1, 16)
GOALS = {1: 0.75, 16: 0.85}
"""Of the engine with all in one process, with one actor."""
PARTS = ("speed", "messages", "prefill", "kill", "replica")
PROMPT_TOKENS = 32
LONG_PROMPT_TOKENS = 1024
KV_BUDGET_BYTES = 256 << 20


@dataclass
class Contender:
    """An engine, and the actors that compute its experts."""

    name: str
    loaded: LoadedEngine
    actors: list[ActorProcess] = field(default_factory=list)
    num_submitted: int = 0

    def submit(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Greedy requests that run to `num_tokens` whatever they say."""
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        for prompt in prompts:
            self.num_submitted += 1
            name = f"{self.name}-{self.num_submitted}"
            self.loaded.engine.submit(GenerationRequest(name, tuple(prompt), sampling))

    def step_s(self) -> float:
        began = perf_counter()
        self.loaded.engine.step()
        return perf_counter() - began

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Tokens/s of all streams together, after their prompts. Every step but the first few has all of them."""
        engine = self.loaded.engine
        self.begin(prompts, num_tokens)
        before, began = engine.stats.generated_tokens, perf_counter()
        while engine.has_work:
            engine.step()
        return (engine.stats.generated_tokens - before) / (perf_counter() - began)

    def begin(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Submit, and step until all prompts are computed."""
        engine = self.loaded.engine
        computed = engine.stats.prompt_tokens + sum(map(len, prompts))
        self.submit(prompts, num_tokens)
        while engine.stats.prompt_tokens < computed:
            engine.step()


@contextmanager
def contender(root: Path, num_actors: int, num_replicas: int = 1) -> Iterator[Contender]:
    """num_actors: 0 for an engine that computes its experts itself; else one for each group, times `num_replicas`."""
    with ExitStack() as stack:
        store = ExpertStore.open(root)
        threads = plan_threads(
            num_cores(), num_actors, read_model_config(store.served.config).expert_elements
        )
        spin_s = plan_spin_s(num_cores(), num_actors, threads.expert_actor)
        groups = split_experts(store.expert_keys(store.served.name), num_actors) if num_actors else []
        owners = {
            key: tuple(f"experts-{index}-{replica}" for replica in range(num_replicas))
            for index, group in enumerate(groups)
            for key in group
        }
        actors: dict[str, ActorProcess] = {}
        for index, group in enumerate(groups):
            for replica in range(num_replicas):
                name = f"experts-{index}-{replica}"
                actors[name] = ActorProcess(actor_spec(root, name, group, threads.expert_actor, spin_s))
                stack.callback(actors[name].kill)
        roster = Roster(1, {name: actor.wait() for name, actor in actors.items()}, owners)

        def connect(worker: ExpertWorker) -> LocalDirectory | RemoteDirectory:
            limits = TransportLimits(spin_s=spin_s)
            return (
                RemoteDirectory(worker, roster, SECRET, limits=limits) if actors else LocalDirectory(worker)
            )

        options = EngineOptions(kv_budget_bytes=KV_BUDGET_BYTES, num_threads=threads.router)
        loaded = load_engine(store, options, connect)
        stack.callback(loaded.close)
        if not actors:
            loaded.worker.load_all()
        label = f"{len(actors)} actors" if actors else "in process"
        yield Contender(label.replace("1 actors", "1 actor"), loaded, list(actors.values()))


def measure_speed(
    contenders: Sequence[Contender], streams: int, num_rounds: int, num_tokens: int
) -> dict[str, Any]:
    """Tokens/s by contender, and each round's ratio to the first contender of that round. One round is not counted."""
    speeds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(num_rounds + 1):
        turn = contenders if number % 2 else contenders[::-1]
        for contender in turn:
            speed = contender.decode(prompts_for(contender, streams), num_tokens)
            if number:
                speeds[contender.name].append(speed)
    base = speeds[contenders[0].name]
    return {
        name: {
            "tokens_per_s": spread(found),
            "ratio": spread([a / b for a, b in zip(found, base, strict=True)]),
        }
        for name, found in speeds.items()
    }


def count_messages(contender: Contender, num_tokens: int) -> dict[str, float]:
    """Of one stream, each way counted as one message: per token, and per token and layer with experts."""
    sent: list[ExpertCall] = []
    start = ExpertConnection.start

    def counted(link: ExpertConnection, call: ExpertCall, **options: Any) -> None:
        sent.append(call)
        start(link, call, **options)

    with (  # the C source sends the same ones
        mock.patch.object(RemoteDirectory, "exchange", lambda *_: None),
        mock.patch.object(ExpertConnection, "start", counted),
    ):
        engine = contender.loaded.engine
        contender.begin(prompts_for(contender, 1), num_tokens + 1)
        sent.clear()
        began = engine.stats.generated_tokens
        while engine.has_work:
            engine.step()
        tokens = engine.stats.generated_tokens - began
    layers = len(contender.loaded.config.moe_layers)
    row = contender.loaded.config.hidden_size * contender.loaded.dtype.itemsize
    nbytes = sum(call.tokens_TD.nbytes + call.num_rows * row for call in sent)
    return {
        "messages_per_token": 2 * len(sent) / tokens,
        "messages_per_token_and_layer": 2 * len(sent) / tokens / layers,
        "kilobytes_per_token": nbytes / tokens / 1e3,
        "kilobytes_per_token_and_layer": nbytes / tokens / layers / 1e3,
    }


def measure_prefill(contender: Contender) -> dict[str, float]:
    """How long a stream's step takes alone, and as a rule and at most while a long prompt is computed beside it in
    chunks; and how long that prompt takes, against the same one alone. Times in milliseconds."""
    engine = contender.loaded.engine
    lone_prompt_s = sum(_prompt_steps(contender, seed=98))
    contender.submit(prompts_for(contender, 1), 1000)
    for _ in range(20):
        engine.step()
    alone = statistics.median(contender.step_s() for _ in range(40))
    beside = _prompt_steps(contender, seed=99)
    for name in engine.open_requests():
        engine.cancel(name)
    while engine.has_work:
        engine.step()
    return {
        "alone_ms": alone * 1e3,
        "beside_ms": statistics.median(beside) * 1e3,
        "longest_ms": max(beside) * 1e3,
        "steps": max(beside) / alone,
        "prompt_ms": sum(beside) * 1e3,
        "prompt_alone_ms": lone_prompt_s * 1e3,
    }


def _prompt_steps(contender: Contender, seed: int) -> list[float]:
    """Submit a long prompt; seconds of the steps until it is computed."""
    engine = contender.loaded.engine
    computed = engine.stats.prompt_tokens + LONG_PROMPT_TOKENS
    contender.submit([_prompt(contender, LONG_PROMPT_TOKENS, seed)], 1)
    steps = []
    while engine.stats.prompt_tokens < computed:
        steps.append(contender.step_s())
    return steps


def measure_kill(root: Path, num_replicas: int, num_tokens: int) -> dict[str, Any]:
    """The stall of one stream when the actor of all its experts is killed, and whether its tokens stay the same."""
    with contender(root, 1, num_replicas) as served:
        undisturbed = _tokens(served, num_tokens, kill_after=None)
        start_s = served.actors[0].start_s
        disturbed = _tokens(served, num_tokens, kill_after=num_tokens // 2)
    usual_s = statistics.median(undisturbed.step_s)
    return {
        "cold_start_s": start_s,
        "stall_s": max(disturbed.step_s[num_tokens // 2 :]) - usual_s,
        "usual_step_s": usual_s,
        "later_step_s": statistics.median(disturbed.step_s[-num_tokens // 4 :]),
        "is_same": undisturbed.tokens == disturbed.tokens,
    }


def measure_one_down(root: Path, num_rounds: int, num_tokens: int) -> dict[str, Any]:
    """Tokens/s of the most streams with two replicas of one group, then with one of them killed; one run of each is not
    counted, the second one of which has the stall."""
    with contender(root, 1, num_replicas=2) as served:

        def speeds() -> list[float]:
            prompts = prompts_for(served, STREAMS[-1])
            return [served.decode(prompts, num_tokens) for _ in range(num_rounds + 1)][1:]

        both = speeds()
        served.actors[0].kill()
        left = speeds()
    return {
        "both": spread(both),
        "one_left": spread(left),
        "ratio": statistics.median(left) / statistics.median(both),
    }


@dataclass
class _Story:
    tokens: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)


def _tokens(served: Contender, num_tokens: int, kill_after: int | None) -> _Story:
    story, engine = _Story(), served.loaded.engine
    served.submit(prompts_for(served, 1), num_tokens)
    while engine.has_work:
        if kill_after is not None and len(story.tokens) == kill_after:
            served.actors[0].kill()
        began = perf_counter()
        events = engine.step()
        story.step_s.append(perf_counter() - began)
        story.tokens.extend(token for event in events for token in event.token_ids)
    return story


def prompts_for(contender: Contender, streams: int, first_seed: int = 0) -> list[list[int]]:
    """The same for every contender."""
    return [_prompt(contender, PROMPT_TOKENS, first_seed + seed) for seed in range(streams)]


def _prompt(contender: Contender, length: int, seed: int) -> list[int]:
    vocabulary = contender.loaded.config.vocab_size
    found: list[int] = np.random.default_rng(seed).integers(3, vocabulary, length).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="stories", help="a store, a checkpoint, or a bundled model's name")
    parser.add_argument("--rounds", type=int, default=5, help="counted ones; at least 2")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream and round")
    parser.add_argument(
        "--kills", type=int, default=5, help="with a replica, and as many without; at least 2"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    parser.add_argument("--name", help="of the kept result; default: by the store")
    options = parser.parse_args()
    root = resolve_store(options.store, announce=print)
    results: dict[str, Any] = {}
    if {"speed", "messages", "prefill"}.intersection(options.parts):
        with ExitStack() as stack:
            contenders = [stack.enter_context(contender(root, number)) for number in (0, *ACTORS)]
            if "speed" in options.parts:
                results |= compare_speed(contenders, options.rounds, options.tokens)
            if "messages" in options.parts:
                results["messages"] = {c.name: count_messages(c, options.tokens) for c in contenders[1:]}
            if "prefill" in options.parts:
                results["prefill"] = {c.name: measure_prefill(c) for c in contenders}
        for part in {"messages", "prefill"}.intersection(results):
            for name, found in results[part].items():
                print(f"{part}, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
    if "kill" in options.parts:
        results |= compare_kills(root, options.kills, options.tokens)
    if "replica" in options.parts:
        results["one of two replicas down"] = found = measure_one_down(root, options.rounds, options.tokens)
        print(f"one of two replicas down: {found['ratio']:.2f} of the tokens/s with both")
    config = {key: value for key, value in vars(options).items() if key not in ("keep", "store", "name")}
    name = "bench_cluster" if options.store == "stories" else f"bench_cluster_{Path(options.store).name}"
    finish(
        options.name or name,
        config | {"store": Path(options.store).name, "goals": {str(k): v for k, v in GOALS.items()}},
        results,
        is_kept=options.keep,
    )


def compare_speed(contenders: Sequence[Contender], num_rounds: int, num_tokens: int) -> dict[str, Any]:
    results = {}
    for streams in STREAMS:
        results[f"{streams} streams"] = speed = measure_speed(contenders, streams, num_rounds, num_tokens)
        for name, found in speed.items():
            tokens_per_s, ratio = found["tokens_per_s"]["median"], found["ratio"]
            goal = f"; goal {GOALS[streams]}" if name == "1 actor" else ""
            print(
                f"{streams:2} streams, {name:10}: {tokens_per_s:7.1f} tokens/s, {ratio['median']:.2f} of in "
                f"process ({ratio['p5']:.2f} to {ratio['p95']:.2f}){goal}"
            )
    return results


def compare_kills(root: Path, num_kills: int, num_tokens: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for label, replicas in (("without a replica", 1), ("with a replica", 2)):
        kills = [measure_kill(root, replicas, num_tokens) for _ in range(num_kills)]
        found: dict[str, Any] = {
            key: spread([kill[key] for kill in kills]) for key in kills[0] if key != "is_same"
        }
        found["are_tokens_the_same"] = all(kill["is_same"] for kill in kills)
        results[f"killed {label}"] = found
        stall, start = (found[key]["median"] for key in ("stall_s", "cold_start_s"))
        print(
            f"killed {label}: stall {stall * 1e3:.0f} ms, C {start:.1f} s, "
            f"same tokens: {found['are_tokens_the_same']}"
        )
    return results


if __name__ == "__main__":
    main()
