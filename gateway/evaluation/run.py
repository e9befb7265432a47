"""Runs an evaluation: texts, window by window, through the engine that serves.

Windows are prompts whose logprobs are asked for, so every number comes from the exact path, whatever the budget. A
step computes `batch_tokens` rows, which says what a miss is: with many rows a layer needs most of its experts at
once, with one row it needs those of one token, as in decode. Experts are counted from a cold cache; every text after
the first finds what those before it left. Called by `gateway.evaluation.command` and `benchmarks/quality.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experts.budget import BudgetRequest, ExpertBytes, measure_experts, resolve_budget
from experts.devices import CPU
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.quantised import planned_form
from experts.store import ExpertStore
from gateway.errors import EvaluationFailed, OptionInvalid
from gateway.evaluation.statistics import Cluster
from gateway.evaluation.windows import Sliding, Window, cut_windows
from gateway.local.study import NO_STUDY, Study, studied
from gateway.service.memory import plan_engine
from gateway.text.tokenizer import TextTokenizer
from gateway.text_file import read_text_file
from router.batcher import BatchLimits
from router.engine import Engine
from router.errors import TraceFailed
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.means_keeper import StandInOptions
from router.one_stream import OneStream
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import NATIVE_CHOICE, RoutingChoice
from router.scoring import DEFAULT_PRESET, PRESETS, SnarcWeights
from router.steering import SteeredPolicy

MAX_TEXT_BYTES = 256 << 20
WAITING_WINDOWS = 4
"""Windows beyond those of one step that are open, so that no step has fewer rows than it could."""


@dataclass(frozen=True)
class EvalText:
    """A text as tokens. name: how the results call it."""

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, and how."""

    sliding: Sliding = field(default_factory=Sliding)
    batch_tokens: int = 512
    """Rows of a step."""
    budgets: tuple[BudgetRequest, ...] = ()
    """Of experts; none means that all may stay."""
    eviction: Eviction = DEFAULT_EVICTION
    dtype: str | None = None
    routing: RoutingChoice = NATIVE_CHOICE
    snarc: SnarcWeights = PRESETS[DEFAULT_PRESET]
    study: Study = NO_STUDY
    is_one_stream: bool = False
    """Route every row, and count misses, as one stream that decodes would with a cache of the budget's size; see
    `router.one_stream`. Nothing is then kept out of memory."""
    device: torch.device = CPU
    host_budgets: tuple[BudgetRequest, ...] = ()
    """Of experts in host memory behind another device."""

    def __post_init__(self) -> None:
        """Raises OptionInvalid."""
        self.study.policy_beside(self.routing)

    @property
    def policy(self) -> str:
        """As results name it."""
        return self.study.policy_beside(self.routing)


@dataclass(frozen=True)
class ExpertCounts:
    """What experts were asked for: one use is one expert in one layer of one step, however many rows it has."""

    hits: int
    misses: int
    bytes_read: int
    first_loads: int
    """Misses of experts that were never needed before: no cache has fewer."""
    choice_misses: int | None = None
    """Experts of single tokens that were not resident when they were chosen; known where routing is not native."""
    stand_ins: int = 0
    """Uses for which mean outputs stood in; they are neither hits nor misses."""

    def since(self, earlier: ExpertCounts) -> ExpertCounts:
        """Without what was counted earlier."""
        return ExpertCounts(
            self.hits - earlier.hits,
            self.misses - earlier.misses,
            self.bytes_read - earlier.bytes_read,
            self.first_loads - earlier.first_loads,
            stand_ins=self.stand_ins - earlier.stand_ins,
        )


@dataclass(frozen=True)
class WindowScore:
    """Natural log probabilities of a window's scored tokens, in order."""

    window: Window
    logprobs: tuple[float, ...]

    @property
    def cluster(self) -> Cluster:
        return Cluster(len(self.logprobs), -sum(self.logprobs))


@dataclass(frozen=True)
class TextScore:
    text: EvalText
    windows: tuple[WindowScore, ...]
    experts: ExpertCounts
    seconds: float

    @property
    def clusters(self) -> list[Cluster]:
        return [score.cluster for score in self.windows]


@dataclass(frozen=True)
class Evaluation:
    """All texts, and what they were evaluated with."""

    texts: tuple[TextScore, ...]
    options: EvalOptions
    store_hash: str
    dtype: str
    numerics_class: str
    quantization: str | None
    """What of the weights is quantised; None where nothing is."""
    backbone_bytes: int
    """In memory; all of it stays."""
    expert_bytes: int
    """Of all experts, as they are in memory."""
    budget_bytes: int
    """What of them may stay."""
    trace_failure: TraceFailed | None = None
    """Why there is no trace, though one was asked for and everything was scored."""

    @property
    def windows(self) -> dict[str, list[Window]]:
        """Of each text, by its name."""
        return {score.text.name: [found.window for found in score.windows] for score in self.texts}


def read_texts(tokenizer: TextTokenizer, paths: Sequence[Path], max_tokens: int | None) -> list[EvalText]:
    """Named by their files; max_tokens: of each text, the first so many. Raises FileUnusable or EvaluationFailed."""
    names = [path.name for path in paths]
    texts = []
    for path, name in zip(paths, names, strict=True):
        ids = tuple(tokenizer.encode(read_text_file(str(path), MAX_TEXT_BYTES).text)[:max_tokens])
        if len(ids) < 2:
            raise EvaluationFailed(f"{path}: {len(ids)} tokens leave nothing to score")
        texts.append(EvalText(name if names.count(name) == 1 else str(path), ids))
    return texts


def evaluate(
    root: Path,
    read: Callable[[TextTokenizer], Sequence[EvalText]],
    options: EvalOptions,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score all texts. read: gives them, by the store's tokenizer. show: called with scored tokens and their number.

    Raises OptionInvalid, EvaluationFailed, or what loading the engine, reading texts or `studied` raises; of a trace
    that failed once everything is scored, the evaluation tells instead.
    """
    texts = read(TextTokenizer.from_folder(root))
    store = ExpertStore.open(root)
    loaded = load_engine(store, _engine_options(store, options))
    try:
        context = loaded.engine.max_tokens_per_sequence
        if options.sliding.context > context:
            raise OptionInvalid(
                "--context", f"({options.sliding.context}) is above what fits, {context} tokens"
            )
        total = sum(len(text.ids) - 1 for text in texts)
        num_done = 0

        def count(num_tokens: int) -> None:
            nonlocal num_done
            num_done += num_tokens
            show(num_done, total)

        show(0, total)
        keys = store.expert_keys(store.served.name)
        form = planned_form(store, loaded.dtype, {store.served.name: loaded.config.hidden_size})
        expert_bytes = measure_experts(store, keys, form).total
        scores, trace_failure = _score_texts(loaded, texts, options, expert_bytes, count)
        return Evaluation(
            tuple(scores),
            options,
            store.hash,
            str(loaded.dtype).removeprefix("torch."),
            loaded.numerics_class,
            store.quantised.name,
            loaded.engine.backbone.nbytes,
            expert_bytes,
            _budget_bytes(loaded, options, expert_bytes),
            trace_failure,
        )
    finally:
        loaded.close()


def _engine_options(store: ExpertStore, options: EvalOptions) -> EngineOptions:
    """Raises BudgetTooSmall or NodeTooSmall."""
    num_running = options.batch_tokens // options.sliding.context + 2
    engine = EngineOptions(
        dtype=options.dtype,
        device=options.device,
        eviction=options.eviction,
        limits=BatchLimits(
            options.batch_tokens, num_running, WAITING_WINDOWS, admission_reserve=0, is_paced=False
        ),
        max_model_len=options.sliding.context,
        snarc=options.snarc,
        efforts=(options.routing.effort,),
        stand_ins=StandInOptions() if options.routing.policy == "snarc" else None,
    )
    is_bounded = options.budgets and not options.is_one_stream
    if not is_bounded:
        return engine
    return plan_engine(store, engine, options.budgets, host_requests=options.host_budgets)[0]


def _budget_bytes(loaded: LoadedEngine, options: EvalOptions, expert_bytes: int) -> int:
    if options.is_one_stream and options.budgets:
        return resolve_budget(options.budgets, ExpertBytes(expert_bytes, 1), expert_bytes)
    return min(expert_bytes, loaded.worker.budget_bytes or expert_bytes)


Counter = Callable[[], ExpertCounts]
"""What experts were asked for since the start."""


def _worker_counter(loaded: LoadedEngine) -> Counter:
    """One use is one expert in one layer of one step."""

    def count() -> ExpertCounts:
        stats = loaded.worker.stats
        return ExpertCounts(stats.hits, stats.misses, stats.bytes_read, len(stats.experts_used))

    return count


def follow_one_stream(loaded: LoadedEngine, options: EvalOptions, expert_bytes: int) -> Counter:
    """Let `OneStream` route and count from now on: one use is one expert of one row.

    The budget holds the same number of experts of every layer, rounded down. Raises OptionInvalid.
    """
    config, policy = loaded.config, loaded.engine.policy
    num_layers = len(config.moe_layers)
    bytes_each = expert_bytes // (num_layers * config.num_experts)
    budget = _budget_bytes(loaded, options, expert_bytes)
    capacity = min(config.num_experts, budget // (bytes_each * num_layers))
    if not isinstance(policy, SteeredPolicy):
        raise OptionInvalid("--one-stream", "goes with neither --mask-experts nor --replay-routing")
    if capacity < 1:
        raise OptionInvalid("--one-stream", "needs a budget of at least one expert a layer")
    stream = OneStream(config.num_experts, capacity, options.eviction, options.snarc, policy.means)
    if options.routing.is_plain:
        loaded.engine.watchers = (*loaded.engine.watchers, stream)
    else:
        policy.chooser = stream

    def count() -> ExpertCounts:
        done = stream.counts
        hits = done.uses - done.misses - done.stand_ins
        first_loads = len(loaded.worker.stats.experts_used)
        return ExpertCounts(
            hits, done.misses, done.misses * bytes_each, first_loads, stand_ins=done.stand_ins
        )

    return count


def _score_texts(
    loaded: LoadedEngine,
    texts: Sequence[EvalText],
    options: EvalOptions,
    expert_bytes: int,
    count: Callable[[int], None],
) -> tuple[list[TextScore], TraceFailed | None]:
    """All texts, and why the trace failed once they were scored: what took hours is not lost with it."""
    scores: list[TextScore] = []
    try:
        with studied(loaded, options.study, options.policy):
            counter = _worker_counter(loaded)
            if options.is_one_stream:
                counter = follow_one_stream(loaded, options, expert_bytes)
            for number, text in enumerate(texts):
                scores.append(_score_text(loaded, number, text, options, counter, count))
    except TraceFailed as error:
        if len(scores) < len(texts):
            raise
        return scores, error
    return scores, None


def _score_text(
    loaded: LoadedEngine,
    number: int,
    text: EvalText,
    options: EvalOptions,
    counter: Counter,
    count: Callable[[int], None],
) -> TextScore:
    before = counter()
    started = time.perf_counter()
    windows = cut_windows(len(text.ids), options.sliding)
    requests = (window_request(number, text, window, options.routing) for window in windows)
    found: dict[str, tuple[float, ...]] = {}
    choice_misses = None
    for event in _run(loaded.engine, requests):
        logprobs = tuple(entry.logprob for entry in event.prompt_logprobs if entry is not None)
        found[event.request_id] = logprobs
        if event.routing is not None:
            choice_misses = (choice_misses or 0) + event.routing.misses
        count(len(logprobs))
    seconds = time.perf_counter() - started
    scores = [WindowScore(window, found[window_name(number, window)]) for window in windows]
    counts = replace(counter().since(before), choice_misses=choice_misses)
    return TextScore(text, tuple(scores), counts, seconds)


def window_name(number: int, window: Window) -> str:
    """Of the request that scores a window of text `number`: what traces call it."""
    return f"{number}:{window.first}"


def window_request(number: int, text: EvalText, window: Window, routing: RoutingChoice) -> GenerationRequest:
    """A prompt of which only the scored tokens' logprobs are asked for, and nothing generated."""
    return GenerationRequest(
        window_name(number, window),
        text.ids[window.first : window.end],
        SamplingParams(max_tokens=0),
        num_prompt_logprobs=0,
        num_unscored=window.num_context,
        routing=routing,
    )


def _run(engine: Engine, requests: Iterator[GenerationRequest]) -> Iterator[TokenEvent]:
    """Yields each window's only event as it ends. Raises EvaluationFailed."""
    while True:
        with suppress(StopIteration):
            while engine.num_running + engine.num_waiting < engine.limits.max_open:
                engine.submit(next(requests))
        if not engine.has_work:
            return
        for event in engine.step():
            if event.error:
                raise EvaluationFailed(f"window {event.request_id} could not be scored: {event.error}")
            yield event
