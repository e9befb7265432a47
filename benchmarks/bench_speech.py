"""How long does a second of speech take, and where does the time go?

The parts of Qwen3-Omni-30B-A3B that speak at their published sizes with random weights: talker (20 layers of 128
experts), code predictor, codec; behind a text's decoder of two layers, whose time is not counted. A reply of 24 tokens
is spoken for so many frames of 80 ms. In turns:
- one speech with one thread, as on a router of two cores, and with all;
- several together, with all threads;
- with parts of the talker's experts in memory (`--budgets`), read past the page cache;
- quantised throughout (`--forms`), which is another model;
- `transformers`' talker, code predictor and codec on the same checkpoint (`--peer`; takes 10 GB more).
Reported: seconds of speech a second, milliseconds a frame by phase, and the time to the first samples.

Usage: python -m benchmarks.bench_speech [--folder DIR] [--frames N] [--streams N ...] [--rounds N] [--peer] [--keep]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.published_omni import (
    ASSISTANT,
    LINE_BREAK,
    TURN_END,
    TURN_START,
    USER,
    write_speaking_checkpoint,
)
from benchmarks.report import finish, spread
from experts.cores import num_cores
from experts.numerics import computing_threads
from experts.store import ExpertStore
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.loading import EngineOptions, load_engine
from router.request import GenerationRequest, SamplingParams
from router.speech.speech_engine import SpeechEngine
from router.speech.wish import SAMPLE_RATE, SAMPLES_OF_FRAME, SpeechWish

PROMPT = (
    TURN_START,
    USER,
    LINE_BREAK,
    *range(1000, 1016),
    TURN_END,
    LINE_BREAK,
    TURN_START,
    ASSISTANT,
    LINE_BREAK,
)
REPLY = (*range(2000, 2024), TURN_END)
FRAME_S = SAMPLES_OF_FRAME / SAMPLE_RATE
Run = Callable[[], dict[str, float]]


def speak(engine: SpeechEngine, streams: int, frames: int, threads: int) -> dict[str, float]:
    """Several speeches that are asked for together."""
    sampling = SamplingParams(max_tokens=frames, temperature=0.0, repetition_penalty=1.05)
    before = dict(engine.speaker.stats.phase_seconds) | {"sound": engine.stats.seconds}
    num_frames, first_s = engine.speaker.stats.frames, 0.0
    began = perf_counter()
    with computing_threads(threads):
        for number in range(streams):
            wish = SpeechWish(REPLY, ("ethan", "chelsie", "aiden")[number % 3])
            engine.add(GenerationRequest(f"s{number}", PROMPT, sampling, speech=wish), None)
        while engine.has_work:
            if any(event.samples for event in engine.step()) and not first_s:
                first_s = perf_counter() - began
    seconds = perf_counter() - began
    after = dict(engine.speaker.stats.phase_seconds) | {"sound": engine.stats.seconds}
    spoken = engine.speaker.stats.frames - num_frames
    phases = {f"{name}_ms_a_frame": 1e3 * (after[name] - before[name]) / spoken for name in after}
    return {
        "speech_s_per_s": spoken * FRAME_S / seconds,
        "first_samples_s": first_s,
        "frames": spoken,
    } | phases


def transformers_run(folder: Path, frames: int) -> Run:
    """Its whole program, less the same with one frame: what is before the first one, and the text."""
    import transformers

    model: Any = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    model.eval()
    ids = torch.tensor([PROMPT])

    def generate(num_frames: int) -> tuple[float, int]:
        began = perf_counter()
        with torch.inference_mode():
            _, wav = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                speaker="Ethan",
                return_audio=True,
                thinker_max_new_tokens=len(REPLY),
                talker_max_new_tokens=num_frames + 1,
                talker_do_sample=False,
            )
        return perf_counter() - began, round(wav.numel() / SAMPLES_OF_FRAME)

    def run() -> dict[str, float]:
        short, long = generate(2), generate(frames)
        spoken = long[1] - short[1]
        return {"speech_s_per_s": spoken * FRAME_S / (long[0] - short[0]), "frames": spoken}

    return run


def measure(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """In alternating order; one round is not counted."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            result = runs[name]()
            if number:
                found[name].append(result)
                print(
                    f"round {number}: {name:24} {result['speech_s_per_s']:.3f} s of speech a second",
                    flush=True,
                )
    return {
        name: {key: spread([result[key] for result in results]) for key in results[0]}
        for name, results in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the model stays; default: a temporary one")
    parser.add_argument("--frames", type=int, default=50, help="most of a speech; 25 are two seconds")
    parser.add_argument("--streams", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="shares of the talker's experts")
    parser.add_argument("--forms", nargs="*", default=[], choices=("int8", "int4"), help="of all matrices")
    parser.add_argument("--rounds", type=int, default=3, help="counted ones")
    parser.add_argument("--peer", action="store_true", help="beside transformers")
    parser.add_argument("--quick", action="store_true", help="a small talker: does it run?")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="speech-")))
        checkpoint = folder / "omni-speech"
        if not checkpoint.exists():
            write_speaking_checkpoint(checkpoint, is_tiny=options.quick)
        runs = _runs(_stored(checkpoint, None, stack), options, stack)
        for form in options.forms:
            engine = _opened(_stored(checkpoint, form, stack), None, stack)
            for name, threads in (("", num_cores()), (", 1 thread", 1)):
                runs[f"1 speech, {form}{name}"] = partial(speak, engine, 1, options.frames, threads)
        if options.peer:
            runs["transformers"] = transformers_run(checkpoint, options.frames)
        results = measure(runs, options.rounds)
    for name, result in results.items():
        phases = {key: round(value["median"], 3) for key, value in result.items() if key != "speech_s_per_s"}
        print(f"{name}: {result['speech_s_per_s']['median']:.3f} s of speech a second; {phases}")
    if options.peer:
        own, other = (results[name]["speech_s_per_s"] for name in ("1 speech", "transformers"))
        print(f"one speech beside transformers: {own['median'] / other['median']:.2f}")
    config = {key: value for key, value in vars(options).items() if key not in ("keep", "folder")}
    finish("bench_speech", config, results, is_kept=options.keep)


def _stored(checkpoint: Path, form: str | None, stack: ExitStack) -> ExpertStore:
    """form: of every matrix that can be quantised; None indexes the checkpoint as it is."""
    root = checkpoint.with_name("-".join(filter(None, (checkpoint.name, form, "store"))))
    if not root.exists() and form is None:
        extract(checkpoint, root, index_only=True)
    elif not root.exists():
        part = Quantization.model_validate({"scheme": form, "group_size": 32 if form == "int4" else None})
        extract(checkpoint, root, quantised=QuantisedParts(part, part, part))
    store = ExpertStore.open(root)
    stack.callback(store.close)
    return store


def _opened(store: ExpertStore, budget_bytes: int | None, stack: ExitStack) -> SpeechEngine:
    """With as much in memory as may be. budget_bytes: of the talker's experts; None takes all of them."""
    choices = EngineOptions(has_speech=True, speech_budget_bytes=budget_bytes, kv_budget_bytes=1 << 26)
    loaded = load_engine(store, choices)
    stack.callback(loaded.worker.close)
    assert loaded.speech is not None
    engine = loaded.speech.open()
    stack.callback(engine.close)
    while engine.load_more():
        pass
    return engine


def _runs(store: ExpertStore, options: argparse.Namespace, stack: ExitStack) -> dict[str, Run]:
    keys = store.expert_keys("talker")
    all_bytes = sum(store.record(key).nbytes for key in keys)
    runs: dict[str, Run] = {}
    cores = num_cores()
    whole = _opened(store, None, stack)
    runs["1 speech, 1 thread"] = partial(speak, whole, 1, options.frames, 1)
    for streams in (1, *options.streams):
        name = f"{streams} speech{'es' if streams > 1 else ''}"
        runs[name] = partial(speak, whole, streams, options.frames, cores)
    for share in options.budgets:
        part = _opened(store, int(share * all_bytes), stack)
        runs[f"1 speech, {share:.0%} of experts"] = partial(speak, part, 1, options.frames, cores)
    return runs


if __name__ == "__main__":
    main()
