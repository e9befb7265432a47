"""Runs an evaluation: texts, window by window, through the engine that serves.

Windows are prompts whose logprobs are asked for, so every number comes from the exact path, whatever the budget. A
step computes `batch_tokens` rows, which says what a miss is: with many rows a layer needs most of its experts at
once, with one row it needs those of one token, as in decode. Experts are counted from a cold cache; every text after
the first finds what those before it left. Called by `gateway.eval_command` and `benchmarks/quality.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from experts.budget import BudgetRequest, measure_experts
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.quantised import planned_form
from experts.store import ExpertStore
from gateway.errors import EvaluationFailed, OptionInvalid
from gateway.eval_statistics import Cluster
from gateway.eval_windows import Sliding, Window, cut_windows
from gateway.memory import plan_engine
from gateway.study import NO_STUDY, Study, studied
from gateway.text_file import read_text_file
from gateway.tokenizer import TextTokenizer
from router.batcher import BatchLimits
from router.engine import Engine
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest, SamplingParams, TokenEvent
from router.routing_choice import NATIVE_CHOICE, RoutingChoice
from router.scoring import DEFAULT_PRESET, PRESETS, SnarcWeights

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
    expert_bytes: int
    """Of all experts, in the dtype that was computed in."""
    budget_bytes: int
    """What of them may stay."""

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

    Raises OptionInvalid, EvaluationFailed, or what loading the engine, reading texts or `studied` raises.
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
        with studied(loaded, options.study, options.policy):
            scores = [_score_text(loaded, n, text, options, count) for n, text in enumerate(texts)]
        keys = store.expert_keys(store.served.name)
        form = planned_form(store, loaded.dtype, {store.served.name: loaded.config.hidden_size})
        expert_bytes = measure_experts(store, keys, form).total
        return Evaluation(
            tuple(scores),
            options,
            store.hash,
            str(loaded.dtype).removeprefix("torch."),
            loaded.worker.numerics_class,
            expert_bytes,
            min(expert_bytes, loaded.worker.budget_bytes or expert_bytes),
        )
    finally:
        loaded.close()


def _engine_options(store: ExpertStore, options: EvalOptions) -> EngineOptions:
    """Raises BudgetTooSmall or NodeTooSmall."""
    num_running = options.batch_tokens // options.sliding.context + 2
    engine = EngineOptions(
        dtype=options.dtype,
        eviction=options.eviction,
        limits=BatchLimits(options.batch_tokens, num_running, WAITING_WINDOWS, admission_reserve=0),
        max_model_len=options.sliding.context,
        snarc=options.snarc,
    )
    return plan_engine(store, engine, options.budgets)[0] if options.budgets else engine


def _score_text(
    loaded: LoadedEngine, number: int, text: EvalText, options: EvalOptions, count: Callable[[int], None]
) -> TextScore:
    stats = loaded.worker.stats
    before = (stats.hits, stats.misses, stats.bytes_read, len(stats.experts_used))
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
    stats = loaded.worker.stats
    after = (stats.hits, stats.misses, stats.bytes_read, len(stats.experts_used))
    hits, misses, bytes_read, first_loads = (late - early for early, late in zip(before, after, strict=True))
    counts = ExpertCounts(hits, misses, bytes_read, first_loads, choice_misses)
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
