"""One generation in this process, without Ray and HTTP: what `sage-moe generate` runs."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.memory_plan import MemoryPlan
from experts.budget import BudgetRequest
from experts.store import ExpertStore
from gateway.errors import GenerationFailed
from gateway.http.quality import MODIFIED, describe_quality
from gateway.http.settings import read_eos_token_ids, read_sampling_defaults
from gateway.http.speech import Delivery
from gateway.local.engine_events import Events
from gateway.local.media_prompt import MediaFiles, media_prompt
from gateway.local.speech import SpeechChoice, SpokenAnswer, choose_speech, hear
from gateway.local.study import NO_STUDY, Study, studied
from gateway.service.memory import plan_engine, with_speech_budget
from gateway.text.tokenizer import TextTokenizer
from router.engine_thread import EngineThread
from router.errors import TraceFailed
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.media.items import PlacedMedium
from router.prompt_inputs import NO_INPUTS
from router.request import GenerationRequest, SamplingParams
from router.routing_choice import NATIVE_CHOICE, RoutingChoice, RoutingReport

NO_FILES = MediaFiles()


@dataclass(frozen=True)
class Generation:
    """The result; `as_json` is what `--json` prints."""

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    ttft_s: float
    tokens_per_s: float
    """Of the tokens after the first; 0 where there is only one."""
    resident_bytes: dict[str, int]
    policy: str
    """`native`, or what replaced the checkpoint's routing."""
    expert_budget_bytes: int | None
    """Most bytes of experts that were kept; None means no bound."""
    reports: tuple[RoutingReport, ...] = ()
    """How it was routed, where not plainly."""
    quantization: str | None = None
    """What of the weights is quantised; None where nothing is."""
    failure: TraceFailed | GenerationFailed | None = None
    """Why there is no trace, or no speech, though it was asked for and the text came to its end."""
    spoken: SpokenAnswer | None = None
    """How it sounds, where that was asked for."""

    def as_json(self) -> dict[str, Any]:
        prompt, answer = len(self.prompt_token_ids), len(self.token_ids)
        speech = {} if self.spoken is None else {"speech": self.spoken.as_json()}
        return speech | {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_token_ids": list(self.prompt_token_ids),
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": answer,
                "total_tokens": prompt + answer,
            },
            "timings": {"ttft_s": round(self.ttft_s, 6), "tokens_per_s": round(self.tokens_per_s, 3)},
            "resident_bytes": self.resident_bytes,
            "policy": self.policy,
            "expert_budget_bytes": self.expert_budget_bytes,
            "quantization": self.quantization,
            "sage": describe_quality(self.reports, self.quantization) | self._study_quality(),
        }

    def _study_quality(self) -> dict[str, Any]:
        """What masks and replays change, of which the engine has no report."""
        is_studied = self.policy in ("masked", "replayed")
        return {"quality": MODIFIED, "policy": self.policy} if is_studied else {}


def generate(
    root: Path,
    prompt: str | tuple[int, ...],
    sampling: Mapping[str, Any],
    options: EngineOptions,
    *,
    routing: RoutingChoice = NATIVE_CHOICE,
    budgets: tuple[BudgetRequest, ...] = (),
    host_budgets: tuple[BudgetRequest, ...] = (),
    study: Study = NO_STUDY,
    files: MediaFiles = NO_FILES,
    speech: SpeechChoice | None = None,
    on_text: Callable[[str], None] = lambda text: None,
    on_plan: Callable[[MemoryPlan], None] = lambda plan: None,
) -> Generation:
    """Generate one answer; `on_text` is called with each piece of text as it becomes stable.

    sampling: fields of SamplingParams that were chosen; the checkpoint's recommendation fills in the others.
    budgets: of experts; resolved against this machine's memory and then told to `on_plan`. Without any, those of the
    options hold. host_budgets: of host memory behind a device. files: images and sound before a prompt of text, with
    which they are a user's turn of a conversation. speech: how the answer is spoken, where it is; its prompt is such a
    turn, too.
    Raises OptionInvalid, GenerationFailed, what loading the engine raises, or what `studied` raises before the answer's
    end.
    """
    store = ExpertStore.open(root)
    tokenizer = TextTokenizer.from_folder(root)
    media: tuple[PlacedMedium, ...] = ()
    delivery = None if speech is None else choose_speech(store, speech)
    if (files or delivery) and isinstance(prompt, str):
        prompt_ids, media = media_prompt(store, tokenizer, prompt, files)
        options = replace(options, has_media=bool(files), has_speech=delivery is not None)
        if speech is not None:
            options = with_speech_budget(store, options, speech.budget)
    else:
        prompt_ids = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
    manifest = store.manifest
    facts = asdict(read_sampling_defaults(manifest.generation_config))
    if budgets:
        options, plan = plan_engine(store, options, budgets, host_requests=host_budgets)
        on_plan(plan)
    loaded = load_engine(store, options)
    eos = read_eos_token_ids(manifest, loaded.config.vocab_size)
    params = SamplingParams(stop_token_ids=eos, **(facts | dict(sampling)))
    request = GenerationRequest("generate", prompt_ids, params, routing=routing, media=media)
    answer: Generation | None = None
    try:
        policy = study.policy_beside(routing)
        with studied(loaded, study, policy):
            answer = _run(loaded, tokenizer, request, on_text, policy)
        if delivery is not None:
            answer = _with_speech(loaded, tokenizer, request, answer, delivery)
    except TraceFailed as error:
        if answer is None:
            raise
        return replace(answer, failure=error)
    finally:
        loaded.close()
    return answer


def _run(
    loaded: LoadedEngine,
    tokenizer: TextTokenizer,
    request: GenerationRequest,
    on_text: Callable[[str], None],
    policy: str,
) -> Generation:
    started = time.perf_counter()
    engine = loaded.engine
    engine.submit(request, NO_INPUTS if loaded.media is None else loaded.media.inputs_for(request))
    decoder = tokenizer.detokenizer()
    tokens: list[int] = []
    pieces: list[str] = []
    reason = ""
    first_at = started
    report: RoutingReport | None = None
    while not reason:
        for event in engine.step():
            if event.error:
                raise GenerationFailed(event.error)
            first_at = first_at if tokens else time.perf_counter()
            tokens.extend(event.token_ids)
            report = report if event.routing is None else event.routing.after(report)
            shown = [t for t in event.token_ids if t not in request.sampling.stop_token_ids]
            pieces.append("".join(map(decoder.push, shown)))
            on_text(pieces[-1])
            reason = event.finish_reason or ""
    ended = time.perf_counter()
    pieces.append(decoder.flush())
    on_text(pieces[-1])
    return Generation(
        "".join(pieces),
        tuple(tokens),
        request.prompt_ids,
        reason,
        first_at - started,
        (len(tokens) - 1) / (ended - first_at) if len(tokens) > 1 else 0.0,
        resident_bytes(loaded),
        policy,
        loaded.worker.budget_bytes,
        () if report is None else (report,),
        loaded.store.manifest.quantised.name,
    )


def _with_speech(
    loaded: LoadedEngine,
    tokenizer: TextTokenizer,
    request: GenerationRequest,
    answer: Generation,
    delivery: Delivery,
) -> Generation:
    """The answer with its speech, or with why there is none."""
    try:
        return replace(answer, spoken=_speak(loaded, tokenizer, request, answer, delivery))
    except GenerationFailed as error:
        return replace(answer, failure=error)


def _speak(
    loaded: LoadedEngine,
    tokenizer: TextTokenizer,
    request: GenerationRequest,
    answer: Generation,
    delivery: Delivery,
) -> SpokenAnswer:
    events: Events = queue.SimpleQueue()
    thread = EngineThread(loaded.engine, events.put, loaded.media, loaded.speech)
    silent = {*request.sampling.stop_token_ids, *tokenizer.special_tokens}
    thread.start()
    try:
        return hear(thread, events, request, delivery, [t for t in answer.token_ids if t not in silent])
    finally:
        thread.stop()


def resident_bytes(loaded: LoadedEngine) -> dict[str, int]:
    """What this process holds for the model, by kind."""
    engine, behind = loaded.engine, loaded.worker.stats.behind
    held = {
        "backbone": engine.backbone.nbytes,
        "experts": loaded.worker.resident_bytes,
        "kv_cache": engine.pool.nbytes,
    }
    if loaded.media is not None:
        held["media"] = loaded.media.stats.tower_bytes + loaded.media.stats.kept_bytes
    return held if behind is None else held | {"experts_behind": behind.resident_bytes}
