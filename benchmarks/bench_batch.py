"""How much of the engine's own throughput is left when 64 rows go through `sage-moe batch` and Ray Data?

"engine" is a fresh process that loads the bundled model, starts the clock, hands 64 prompts to the engine and
steps until all have ended. "batch" is what the command runs, also in a fresh process, Ray Data's actor: JSON
lines read and checked, text decoded, a part written and synced; its clock runs from the first part it is given,
model loaded, to the last file it has synced. "warm" is the engine in a process that has computed before: what
is left of the gap is what a long batch does not have. All compute the same tokens with the same number of
threads, and alternate. What starting an actor and loading the model add to a batch is told apart.

Usage: python -m benchmarks.bench_batch [--rounds N] [--tokens N] [--keep]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from benchmarks.report import finish, spread
from experts.store import ExpertStore
from gateway.batch.job import BatchOptions, run_batch
from gateway.batch.output import PartSummary
from gateway.batch.plan import NO_DEFAULTS, Part
from gateway.batch.ray_shell import compute_on_ray, ray_session
from gateway.batch.rows import RawRow, RowPreparer
from gateway.batch.worker import RowsEnded, WorkerSpec
from gateway.http.settings import GatewaySettings
from gateway.stores.source import resolve_store
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest

ROWS = 64
GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each contender")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each row")
    parser.add_argument("--once", type=Path, metavar="ROWS", help="be the fresh process: print its seconds")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    root = resolve_store("stories", announce=print)
    if options.once is not None:
        loaded = load_engine(ExpertStore.open(root), EngineOptions())
        print(_run_engine(loaded, _requests(root, options.once, loaded)))
        return
    with tempfile.TemporaryDirectory() as folder, ray_session(None):
        source = _write_rows(Path(folder) / "rows.jsonl", options.tokens)
        loaded = load_engine(ExpertStore.open(root), EngineOptions())
        requests = _requests(root, source, loaded)
        samples: dict[str, list[float]] = {"engine": [], "warm": [], "batch": [], "command": []}
        for number in range(options.rounds + 1):
            warm_s = _run_engine(loaded, requests)
            engine_s = _run_fresh(source)
            output = Path(folder) / f"output-{number}"
            batch_s, command_s = _run_batch(BatchOptions(root, "stories", source, output))
            if number:  # the first round warms up
                for name, seconds in zip(samples, (engine_s, warm_s, batch_s, command_s), strict=True):
                    samples[name].append(seconds)
    _report(samples, options.tokens, is_kept=options.keep)


def _write_rows(path: Path, num_tokens: int) -> Path:
    rows = [
        {"prompt": f"Once upon a time there were {n} wolves who", "max_tokens": num_tokens, "seed": n}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _requests(root: Path, source: Path, loaded: LoadedEngine) -> list[GenerationRequest]:
    """What the batch makes of the rows, made before the clock starts."""
    tokenizer = TextTokenizer.from_folder(root)
    context, vocabulary = loaded.config.max_position_embeddings, loaded.config.vocab_size
    settings = GatewaySettings.from_manifest(loaded.store.manifest, "stories", context, vocabulary, 0)
    preparer = RowPreparer(settings, tokenizer, ChatTemplate.from_folder(root, tokenizer), NO_DEFAULTS)
    lines = source.read_bytes().splitlines()
    jobs = [preparer.prepare(RawRow(index, line=line)).job for index, line in enumerate(lines)]
    preparer.close()
    return [
        replace(job.choices[0].request, request_id=f"row-{n}")
        for n, job in enumerate(jobs)
        if job is not None
    ]


def _run_engine(loaded: LoadedEngine, requests: Sequence[GenerationRequest]) -> float:
    started = perf_counter()
    for request in requests:
        loaded.engine.submit(request)
    while loaded.engine.has_work:
        loaded.engine.step()
    return perf_counter() - started


def _run_fresh(source: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_batch", "--once", str(source)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _run_batch(options: BatchOptions) -> tuple[float, float]:
    """Seconds by the actor's clock, and of the whole run with a Ray that is up: actor started, model loaded."""
    actor_s = 0.0

    def compute(spec: WorkerSpec, parts: Sequence[Part]) -> Generator[PartSummary | RowsEnded, None, None]:
        nonlocal actor_s
        for event in compute_on_ray(spec, parts):
            actor_s += event.seconds if isinstance(event, RowsEnded) else 0.0
            yield event

    started = perf_counter()
    report = run_batch(options, compute)
    assert (report.rows, report.errors) == (ROWS, 0)
    return actor_s, perf_counter() - started


def _report(samples: dict[str, list[float]], num_tokens: int, *, is_kept: bool) -> None:
    ratios = {
        f"batch_to_{name}": spread([e / b for e, b in zip(samples[name], samples["batch"], strict=True)])
        for name in ("engine", "warm")
    }
    results = {f"{name}_s": spread(seconds) for name, seconds in samples.items()} | ratios
    rates = {name: ROWS / spread(seconds)["median"] for name, seconds in samples.items()}
    to_engine = ratios["batch_to_engine"]
    print(
        f"{ROWS} rows: engine {rates['engine']:.1f} rows/s, batch {rates['batch']:.1f}, "
        f"ratio {to_engine['median']:.3f} ({to_engine['p5']:.3f} to {to_engine['p95']:.3f}); "
        f"goal at least {GOAL}. A warm engine {rates['warm']:.1f}, "
        f"ratio {ratios['batch_to_warm']['median']:.3f}. With an actor that starts and loads the model "
        f"{ROWS / rates['command']:.1f} s instead of {ROWS / rates['batch']:.1f} s"
    )
    config = {"rows": ROWS, "tokens": num_tokens, "model": "stories", "dtype": "bfloat16"}
    finish("bench_batch", config, results, is_kept=is_kept)


if __name__ == "__main__":
    main()
