"""One trial: an answer over HTTP, and something that happens to one of the service's processes in the middle of it.

Everything that chance decides comes from a seed. The answer's tokens, their logprobs to the last bit, its end and its
usage must be those of the undisturbed answer.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import httpx

from tests.chaos.failpoints import Armed, Deed, arm, disarm, fired
from tests.chaos.service_under_fire import MODEL, WAIT_S, ServiceUnderFire, wait_for

PROMPTS = (
    "Once upon a time there was a king who had three daughters",
    "There was once a miller who",
    "In a deep forest lived a wolf, and",
)
MAX_TOKENS = 40
FIRE_WITHIN_S = 240.0

Target = Literal["actor", "newborn actor", "draining actor", "router", "supervisor", "node"]


@dataclass(frozen=True)
class Kind:
    """One thing that may happen, and where."""

    target: Target
    deed: Deed
    points: tuple[str, ...]
    killed_with: Literal["", "actor", "router", "supervisor"] = ""
    """What is killed besides, when the deed is armed: what the service does about that is in its way then."""


CALL_POINTS = (
    "actor has a call",
    "actor computes",
    "actor has computed",
    "actor answers",
    "actor has answered",
)
ROUTER_POINTS = (
    "router asks",
    "router waits",
    "router has rows",
    "router has a token",
    "router sends a token",
)
LINK_POINTS = ("actor has a call", "actor answers", "actor has answered", "router asks", "router waits")
KINDS: dict[str, Kind] = {
    "actor killed": Kind("actor", "kill", CALL_POINTS),
    "actor killed in the middle of a frame": Kind("actor", "kill half-way", ("actor answers",)),
    "actor killed, and its replacement at its start": Kind(
        "newborn actor", "kill", ("actor starts",), killed_with="actor"
    ),
    "actor killed, and its replacement while loading": Kind(
        "newborn actor", "kill", ("actor loads",), killed_with="actor"
    ),
    "actor killed, and its replacement when connected to": Kind(
        "newborn actor", "kill", ("actor is connected to", "actor has welcomed"), killed_with="actor"
    ),
    "actor killed while it drains": Kind("draining actor", "kill", ("actor is asked how it does",)),
    "actor hangs": Kind("actor", "stop", CALL_POINTS),
    "connection cut": Kind("actor", "cut", LINK_POINTS),
    "router killed": Kind("router", "kill", ROUTER_POINTS),
    "router hangs": Kind("router", "stop", ROUTER_POINTS),
    "router killed, and the others with it": Kind("router", "kill", ROUTER_POINTS, killed_with="router"),
    "router killed, and the supervisor with it": Kind(
        "router", "kill", ROUTER_POINTS, killed_with="supervisor"
    ),
    "supervisor killed": Kind("supervisor", "kill", ("supervisor looks",)),
    "actor killed, and the supervisor that replaces it": Kind(
        "supervisor", "kill", ("supervisor has created", "supervisor publishes"), killed_with="actor"
    ),
    "node lost": Kind("node", "lose node", CALL_POINTS),
}


@dataclass(frozen=True)
class Trial:
    """What chance has decided."""

    number: int
    kind: str
    num_replicas: int
    point: str
    prompt: int
    seed: int
    at_token: int
    """After so many the deed is armed."""
    skip: int
    choice: float
    """In [0, 1): which of those in question."""


@dataclass
class Result:
    """What happened."""

    trial: Trial
    is_fired: bool = False
    victim: dict[str, Any] = field(default_factory=dict)
    """Name, pid, incarnation, node, and its raylet's pid."""
    killed_with: list[dict[str, Any]] = field(default_factory=list)
    is_equal: bool = False
    """All answers, and all of each."""
    num_answers: int = 0
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    stall_s: float = 0.0
    """The longest time between one event with tokens and the next, from the deed on."""
    usual_gap_s: float = 0.0
    failovers: dict[str, int] = field(default_factory=dict)
    """By kind, of routers that live."""
    mended_after_s: float | None = None
    """From the deed until all that is planned ran and was connected again."""

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        return {**told.pop("trial"), **told}


def plan_trials(seed: int, counts: Mapping[tuple[str, int], int]) -> list[Trial]:
    """counts: how many of each kind and number of replicas. In a random order, those with most replicas first, and lost
    nodes last: there is least left then."""
    chance = random.Random(seed)
    wanted = [pair for pair, count in counts.items() for _ in range(count)]
    chance.shuffle(wanted)
    wanted.sort(key=lambda pair: (-pair[1], KINDS[pair[0]].target == "node"))
    trials = []
    turns = dict.fromkeys(KINDS, chance.randrange(8))
    for number, (kind, num_replicas) in enumerate(wanted):
        points = KINDS[kind].points
        turns[kind] += 1  # in turn, so that every point is met
        trials.append(
            Trial(
                number,
                kind,
                num_replicas,
                points[turns[kind] % len(points)],
                chance.randrange(len(PROMPTS)),
                chance.randrange(3),
                chance.randrange(3, MAX_TOKENS // 2),
                chance.randrange(12),
                chance.random(),
            )
        )
    return trials


@dataclass
class Answer:
    """As a client gets it."""

    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    came_at_s: list[float] = field(default_factory=list)
    is_done: bool = False
    """Whether the stream said so."""
    error: str = ""

    def content(self) -> tuple[object, ...]:
        parts = (self.tokens, self.logprobs, self.text, self.finish_reason, self.usage)
        return (*parts, self.is_done, self.error)

    def gaps_s(self, since_s: float = 0.0) -> list[float]:
        pairs = zip(self.came_at_s, self.came_at_s[1:], strict=False)
        return [after - before for before, after in pairs if after >= since_s]


def read_answer(url: str, prompt: int, seed: int, max_tokens: int = MAX_TOKENS) -> Iterator[Answer]:
    """The answer as far as it has come, again and again; the last one is whole."""
    body = {
        "model": MODEL,
        "prompt": PROMPTS[prompt],
        "max_tokens": max_tokens,
        "seed": seed,
        "logprobs": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer()
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=2 * WAIT_S) as response:
            for line in response.raise_for_status().iter_lines():
                answer.is_done |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    _take_in(answer, json.loads(line.removeprefix("data: ")))
                    yield answer
    except httpx.HTTPError as error:
        answer.error = repr(error)
    yield answer


def _take_in(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"])
        return
    answer.usage = event.get("usage") or answer.usage
    for choice in event["choices"]:
        answer.text += choice["text"]
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        if choice["logprobs"] and choice["logprobs"]["tokens"]:
            answer.tokens += choice["logprobs"]["tokens"]
            answer.logprobs += choice["logprobs"]["token_logprobs"]
            answer.came_at_s.append(time.monotonic())


class Range:
    """Carries trials out, one after another, on one service."""

    def __init__(self, service: ServiceUnderFire) -> None:
        self.service = service
        self._undisturbed: dict[tuple[int, int], Answer] = {}
        self._num_replicas = 1

    def run(self, trial: Trial, is_mended_after: bool = False) -> Result:
        """is_mended_after: wait at the end until nothing is missing any more."""
        result = Result(trial)
        self._prepare(trial)
        expected = self._expected(trial)
        before = self._failovers()
        deed = _Deed(self.service, trial, result)
        try:
            self._read_until_fired(trial, deed, expected, result)
        finally:
            disarm(self.service.folder)
            deed.end()
        result.failovers = {kind: n - before.get(kind, 0) for kind, n in self._failovers().items()}
        if result.is_fired and is_mended_after:
            self.service.settle()
            result.mended_after_s = time.monotonic() - deed.done_at_s
        return result

    def _prepare(self, trial: Trial) -> None:
        if trial.num_replicas != self._num_replicas:
            self._num_replicas = trial.num_replicas
            self.service.apply(trial.num_replicas)
            self.service.settle()

    def _expected(self, trial: Trial) -> Answer:
        what = (trial.prompt, trial.seed)
        if what not in self._undisturbed:
            self.service.settle()
            *_, self._undisturbed[what] = read_answer(self.service.url, *what)
            assert len(self._undisturbed[what].tokens) == MAX_TOKENS, self._undisturbed[what].error
        return self._undisturbed[what]

    def _failovers(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for router in self.service.routers():
            for kind, number in router["expert_calls"]["failovers_by_kind"].items():
                total[kind] = total.get(kind, 0) + number
        return total

    def _read_until_fired(self, trial: Trial, deed: _Deed, expected: Answer, result: Result) -> None:
        began_s = time.monotonic()
        result.is_equal = True
        gaps_s: list[float] = []
        while not result.is_fired and time.monotonic() - began_s < FIRE_WITHIN_S:
            answer = Answer()
            for answer in read_answer(self.service.url, trial.prompt, trial.seed):
                if len(answer.tokens) >= trial.at_token:
                    deed.begin()
            deed.look()
            result.num_answers += 1
            result.num_tokens += len(answer.tokens)
            if answer.content() != expected.content():
                result.is_equal = False
                result.errors.append(answer.error or f"{answer.content()} is not {expected.content()}")
            since_s = deed.done_at_s if result.is_fired else deed.begun_at_s
            result.stall_s = max([result.stall_s, *answer.gaps_s(since_s)])
            gaps_s += answer.gaps_s()
        result.usual_gap_s = statistics.median(gaps_s) if gaps_s else 0.0


class _Deed:
    """One trial's, from its arming to its end."""

    def __init__(self, service: ServiceUnderFire, trial: Trial, result: Result) -> None:
        self._service, self._trial, self._result = service, trial, result
        self._kind = KINDS[trial.kind]
        self._is_begun = False
        self.begun_at_s = self.done_at_s = float("inf")
        self._entries, self._others = self._choose(), self._choose_another()

    def _choose(self) -> list[dict[str, Any]]:
        """Who is in question, with what is known of each. Waits until somebody is."""
        service, trial = self._service, self._trial
        match self._kind.target:
            case "newborn actor":
                return []  # nobody yet
            case "supervisor":
                return [{"name": "supervisor", "pid": service.supervisor_pid()}]
        if trial.point.startswith("router"):
            return list(wait_for(service.routers))
        actors = wait_for(self._connected_actors)
        victim = self._one_of(actors)
        if self._kind.target == "node":
            return [actor for actor in actors if actor["node_id"] == victim["node_id"]]
        return [victim]

    def _choose_another(self) -> list[dict[str, Any]]:
        """Who is killed besides."""
        match self._kind.killed_with:
            case "actor":
                return [self._one_of(wait_for(self._connected_actors))]
            case "router":
                return list(wait_for(self._service.routers))[1:]
            case "supervisor":
                return [{"name": "supervisor", "pid": self._service.supervisor_pid()}]
        return []

    def _one_of(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return entries[int(self._trial.choice * len(entries))]

    def _connected_actors(self) -> list[dict[str, Any]]:
        """Those that are ready, once all routers have as many connections."""
        actors, routers = self._service.actors(), self._service.routers()
        is_connected = all(router["connected_actors"] == len(actors) for router in routers)
        return actors if routers and is_connected else []

    def begin(self) -> None:
        """Arm it; once."""
        if self._is_begun:
            return
        self._is_begun, self.begun_at_s = True, time.monotonic()
        trial, kind = self._trial, self._kind
        pids = tuple(entry["pid"] for entry in self._entries)
        skip = trial.skip if kind.target in ("actor", "router", "node") else trial.skip % 2
        arm(self._service.folder, Armed(trial.point, kind.deed, pids, skip))
        for entry in self._others:
            self._result.killed_with.append(_facts(entry))
            with suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)
        if kind.target == "draining actor":
            self._service.apply(trial.num_replicas, without=self._entries[0]["actor"])

    def look(self) -> None:
        """Whether it was done, when, and to whom."""
        told = fired(self._service.folder)
        if told is None or self._result.is_fired:
            return
        self._result.is_fired = True
        self.done_at_s = time.monotonic() - (time.time() - told["at"])
        entry = next((e for e in self._entries if e["pid"] == told["pid"]), {"pid": told["pid"]})
        self._result.victim |= {**_facts(entry), "raylet_pid": told["parent"]}

    def end(self) -> None:
        """Undo what the service cannot: a process that hangs goes on, a node comes back."""
        kind, trial = self._kind, self._trial
        if kind.deed == "stop" and self._result.is_fired:
            with suppress(ProcessLookupError):
                os.kill(self._result.victim["pid"], signal.SIGCONT)
        if kind.target == "node" and self._result.is_fired:
            self._service.restore_node()
        if kind.target in ("draining actor", "node"):
            self._service.apply(trial.num_replicas)


def _facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("name", "pid", "incarnation", "node_id") if key in entry}
