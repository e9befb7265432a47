"""The engine's thread: requests from any thread, events out, and what happens when the engine fails."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.http.response_format import JsonForm
from router import engine_thread
from router.batcher import BatchLimits
from router.engine_thread import EngineThread
from router.errors import EngineStopped, QueueFull, RequestTooLong
from router.grammar import Grammars, GrammarState
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from tests.engines import GatedEngine, open_engine, run_to_end, small_engine

LIMITS = BatchLimits(max_running=4, max_waiting=4)
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def loaded(tiny_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32", limits=LIMITS))
    yield loaded
    loaded.close()


class Sink:
    """Collects events; `wait` returns once a condition on it holds."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.samples: dict[str, bytes] = {}
        self.ends: dict[str, TokenEvent] = {}
        self._changed = threading.Condition()

    def __call__(self, events: Sequence[TokenEvent]) -> None:
        with self._changed:
            for event in events:
                assert event.request_id not in self.ends, "an event after the end"
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                self.samples[event.request_id] = self.samples.get(event.request_id, b"") + event.samples
                if event.finish_reason is not None:
                    self.ends[event.request_id] = event
            self._changed.notify_all()

    def wait(self, condition: Callable[[Sink], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), TIMEOUT_S)

    def wait_for_ends(self, *names: str) -> None:
        self.wait(lambda sink: sink.ends.keys() >= set(names))


@pytest.fixture
def engine(loaded: LoadedEngine) -> GatedEngine:
    return GatedEngine(loaded.engine)


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def thread(engine: GatedEngine, sink: Sink) -> Iterator[EngineThread]:
    thread = EngineThread(engine, sink)
    thread.start()
    yield thread
    engine.gate.set()
    thread.stop()


def _request(name: str, length: int = 5, max_tokens: int = 4) -> GenerationRequest:
    chance = random.Random(name)
    prompt = tuple(chance.randrange(500) for _ in range(length))
    return GenerationRequest(name, prompt, SamplingParams(max_tokens, seed=length))


def test_requests_from_many_threads_all_get_their_tokens(
    loaded: LoadedEngine, thread: EngineThread, sink: Sink
) -> None:
    requests = [_request(f"r{number}", 1 + number % 7) for number in range(24)]

    def submit(share: list[GenerationRequest]) -> None:
        for request in share:
            while True:
                try:
                    thread.submit(request)
                    break
                except QueueFull:
                    time.sleep(0.001)

    submitters = [threading.Thread(target=submit, args=(requests[i::4],)) for i in range(4)]
    for submitter in submitters:
        submitter.start()
    for submitter in submitters:
        submitter.join(TIMEOUT_S)
    sink.wait_for_ends(*(request.request_id for request in requests))
    assert sink.tokens == run_to_end(small_engine(loaded, 9), requests).tokens
    assert thread.num_open == 0


def test_step_is_called_while_a_command_waits(engine: GatedEngine, sink: Sink) -> None:
    thread = EngineThread(engine, sink)
    assert not engine.is_called()
    thread.start()
    thread.submit(_request("a"))
    sink.wait_for_ends("a")
    assert not engine.is_called()
    engine.gate.clear()
    engine.entered.clear()
    thread.submit(_request("b"))
    assert engine.entered.wait(TIMEOUT_S)
    thread.submit(_request("c"))
    assert engine.is_called()
    engine.gate.set()
    sink.wait_for_ends("b", "c")
    assert not engine.is_called()
    thread.stop()


def test_cancelled_request_ends_with_that_reason_and_once(thread: EngineThread, sink: Sink) -> None:
    thread.submit(_request("long", 5, 200))
    sink.wait(lambda sink: bool(sink.tokens.get("long")))
    for _ in range(3):
        thread.cancel("long")
    thread.cancel("unknown")
    sink.wait_for_ends("long")
    assert sink.ends["long"].finish_reason == "cancelled"
    assert len(sink.tokens["long"]) < 200
    thread.submit(_request("next"))
    sink.wait_for_ends("next")
    assert sink.ends.keys() == {"long", "next"}


def test_burst_is_taken_up_to_the_limit_and_refused_at_once_beyond(
    engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    engine.gate.clear()
    names = [f"r{number}" for number in range(LIMITS.max_open)]
    for name in names:
        thread.submit(_request(name))
    with pytest.raises(QueueFull, match="8 requests are open already"):
        thread.submit(_request("one-too-many"))
    engine.gate.set()
    sink.wait_for_ends(*names)
    assert {event.finish_reason for event in sink.ends.values()} == {"length"}


def test_request_that_can_never_fit_is_refused_at_once(thread: EngineThread) -> None:
    with pytest.raises(RequestTooLong):
        thread.submit(_request("long", 200, 57))
    assert thread.num_open == 0


def test_used_id_is_refused_at_once_and_leaves_its_owner_alone(
    engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    engine.gate.clear()
    thread.submit(_request("r", 5, 3))
    with pytest.raises(ValueError, match="'r' is in use"):
        thread.submit(_request("r", 9, 2))
    engine.gate.set()
    sink.wait_for_ends("r")
    assert len(sink.tokens["r"]) == 3
    thread.submit(GenerationRequest("again", (1,)))
    sink.wait_for_ends("again")


def test_prompt_that_the_engine_refuses_ends_with_its_reason(thread: EngineThread, sink: Sink) -> None:
    thread.submit(GenerationRequest("bad", (5000,)))
    sink.wait_for_ends("bad")
    assert sink.ends["bad"].finish_reason == "error"
    assert "token id 5000" in str(sink.ends["bad"].error)
    assert thread.num_open == 0


def test_engine_failure_ends_all_requests_and_refuses_later_ones(
    engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    engine.gate.clear()
    engine.failure = RuntimeError("secret detail")
    thread.submit(_request("running"))
    assert engine.entered.wait(TIMEOUT_S)
    thread.submit(_request("still-a-command"))
    engine.gate.set()
    sink.wait_for_ends("running", "still-a-command")
    assert {event.error for event in sink.ends.values()} == {"the engine failed"}
    with pytest.raises(EngineStopped, match="RuntimeError"):
        thread.submit(_request("late"))
    health = thread.health()
    assert (health.is_alive, health.has_work) == (False, False)


def test_request_is_never_lost_between_failure_and_refusal(loaded: LoadedEngine) -> None:
    """Every request that is taken while the engine fails is told; a lost one would wait for ever."""
    for attempt in range(20):
        engine, sink = GatedEngine(loaded.engine), Sink()
        engine.failure = RuntimeError("broken")
        thread = EngineThread(engine, sink)
        thread.start()
        taken = []
        for number in range(LIMITS.max_open):
            try:
                thread.submit(_request(f"{attempt}-{number}"))
            except EngineStopped:
                break
            taken.append(f"{attempt}-{number}")
        sink.wait_for_ends(*taken)
        thread.stop()


def test_stopped_thread_refuses_requests(thread: EngineThread) -> None:
    thread.stop()
    with pytest.raises(EngineStopped, match="shut down"):
        thread.submit(_request("r"))
    assert not thread.health().is_alive


def test_stop_waits_for_the_step_in_progress_only(
    engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    engine.gate.clear()
    thread.submit(_request("r", 5, 100))
    assert engine.entered.wait(TIMEOUT_S)
    stopper = threading.Thread(target=thread.stop)
    stopper.start()
    engine.gate.set()
    stopper.join(TIMEOUT_S)
    assert not stopper.is_alive()
    assert "r" not in sink.ends


class LateClock:
    """In place of the module `time`; runs as far ahead of it as the test says."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, thread: EngineThread) -> LateClock:
    clock = LateClock()
    monkeypatch.setattr(engine_thread, "time", clock)
    return clock


def test_health_tells_work_and_time_without_a_step(
    engine: GatedEngine, thread: EngineThread, sink: Sink, clock: LateClock
) -> None:
    idle = thread.health()
    assert (idle.is_alive, idle.has_work, idle.num_running, idle.num_waiting) == (True, False, 0, 0)
    engine.gate.clear()
    thread.submit(_request("r"))
    assert engine.entered.wait(TIMEOUT_S)
    clock.ahead_s = 100.0
    stuck = thread.health()
    assert stuck.has_work
    assert 100.0 <= stuck.seconds_since_step < 100.0 + TIMEOUT_S
    engine.gate.set()
    sink.wait_for_ends("r")
    assert not thread.health().has_work


def test_first_request_after_a_long_idle_time_does_not_look_stuck(
    engine: GatedEngine, thread: EngineThread, sink: Sink, clock: LateClock
) -> None:
    thread.submit(_request("r"))
    sink.wait_for_ends("r")
    clock.ahead_s = 3600.0
    engine.gate.clear()
    thread.submit(_request("s"))
    assert thread.health().seconds_since_step < TIMEOUT_S


def test_idle_engine_reads_the_experts_that_will_stay(tiny_store: Path, sink: Sink) -> None:
    budget = 1 << 30
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32", expert_budget_bytes=budget))
    thread = EngineThread(loaded.engine, sink)
    thread.start()
    everything = len(loaded.config.moe_layers) * loaded.config.num_experts
    deadline = time.monotonic() + TIMEOUT_S
    while loaded.worker.num_resident < everything and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loaded.worker.num_resident == everything and loaded.worker.stats.misses == 0
    thread.submit(GenerationRequest("q", (1, 2, 3), SamplingParams(max_tokens=2)))
    sink.wait_for_ends("q")
    thread.stop()
    loaded.close()


def test_engine_answers_while_its_experts_are_still_to_be_read(
    tiny_store: Path, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the store: a service is ready before."""
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"))
    assert loaded.worker.num_resident == 0
    monkeypatch.setattr(loaded.directory, "load_more", lambda: False)
    thread = EngineThread(loaded.engine, sink)
    thread.start()
    thread.submit(GenerationRequest("q", (1,), SamplingParams(max_tokens=1)))
    sink.wait_for_ends("q")
    assert 0 < loaded.worker.num_resident < len(loaded.config.moe_layers) * loaded.config.num_experts
    thread.stop()
    loaded.close()


def _constrained(name: str, grammar: str | None = None) -> GenerationRequest:
    sampling = SamplingParams(8, seed=3, grammar=grammar or JsonForm({"enum": ["red", "green"]}).grammar)
    return replace(_request(name), sampling=sampling)


def test_grammar_is_compiled_beside_the_engines_thread(
    loaded: LoadedEngine, engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    """While that computes, and without holding up others; one that cannot be compiled ends its request alone."""
    engine.grammars = gate = GatedGrammars(loaded.store.root, 512)
    thread.submit(_constrained("a"))
    thread.submit(_constrained("bad", "{}"))
    thread.submit(_constrained("gone"))
    assert gate.entered.wait(TIMEOUT_S)
    thread.submit(_request("plain"))
    sink.wait_for_ends("plain")
    thread.cancel("gone")
    sink.wait_for_ends("gone")
    gate.opened.set()
    sink.wait_for_ends("a", "bad")
    assert sink.ends["gone"].finish_reason == "cancelled"
    assert "cannot be followed" in (sink.ends["bad"].error or "")
    assert bytes(sink.tokens["a"]) in (b'"red"', b'"green"')
    assert gate.threads == {"grammars"}
    assert thread.num_open == 0


def test_owners_take_turns_at_having_grammars_compiled(
    loaded: LoadedEngine, engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    engine.grammars = gate = GatedGrammars(loaded.store.root, 512)
    grammars = [JsonForm({"enum": [f"{number}"]}).grammar for number in range(5)]
    for number, grammar in enumerate(grammars):
        owner = "few" if number == 4 else "many"
        thread.submit(replace(_constrained(f"r{number}", grammar), owner=owner))
        assert gate.entered.wait(TIMEOUT_S)
    gate.opened.set()
    sink.wait_for_ends(*(f"r{number}" for number in range(5)))
    assert gate.begun == [grammars[number] for number in (0, 1, 4, 2, 3)]


class GatedGrammars(Grammars):
    """Waits before it compiles, and notes on which threads it is asked to."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        super().__init__(folder, vocab_size)
        self.entered, self.opened = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self.begun: list[str] = []

    def begin(self, text: str, stop_ids: Sequence[int], taken: Iterable[int] = ()) -> GrammarState:
        self.threads.add(threading.current_thread().name)
        self.begun.append(text)
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)
        return super().begin(text, stop_ids, taken)


def test_failure_within_a_compilation_ends_its_request(
    loaded: LoadedEngine, engine: GatedEngine, thread: EngineThread, sink: Sink
) -> None:
    engine.grammars = BrokenGrammars(loaded.store.root, 512)
    thread.submit(_constrained("a"))
    sink.wait_for_ends("a")
    assert sink.ends["a"].finish_reason == "error"


class BrokenGrammars(Grammars):
    """Fails as nothing is expected to."""

    def begin(self, text: str, stop_ids: Sequence[int], taken: Iterable[int] = ()) -> GrammarState:
        raise ZeroDivisionError
