"""Kills a batch at a given moment and starts it again, many times, in one process that forks: `main` is the program.

A moment is before or after a call of the run that changes the output, or a step of the engine.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from experts.store import ExpertStore
from gateway.batch import output as batch_output
from gateway.batch import plan as batch_plan
from gateway.batch.job import BatchOptions, Compute, compute_here, run_batch
from gateway.batch.output import OutputFolder, PartSummary
from gateway.batch.plan import Part
from gateway.batch.rows import RowPreparer
from gateway.batch.source import open_rows
from gateway.batch.worker import PartsRun, RowsEnded, WorkerSpec
from gateway.http.settings import GatewaySettings
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.engine import Engine
from router.request import GenerationRequest, TokenEvent

SMALL_PART_ROWS = 8
NUMERICS_CLASS = "fake"


class FakeEngine:
    """Draws tokens from prompt and seed alone, one a step, for any number of rows at once."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[GenerationRequest, int]] = {}

    def submit(self, request: GenerationRequest) -> None:
        assert request.request_id not in self.open
        self.open[request.request_id] = (request, 0)

    def cancel(self, request_id: str) -> bool:
        return self.open.pop(request_id, None) is not None

    def step(self) -> list[TokenEvent]:
        events = []
        for name, (request, position) in list(self.open.items()):
            sampling = request.sampling
            token = random.Random(f"{sampling.seed} {request.prompt_ids} {position}").randrange(32, 120)
            is_last = position + 1 == sampling.max_tokens
            events.append(TokenEvent(name, (token,), "length" if is_last else None))
            self.open[name] = (request, position + 1)
            if is_last:
                del self.open[name]
        return events


def fake_compute(
    spec: WorkerSpec, parts: Sequence[Part], engine: Any = None
) -> Generator[PartSummary | RowsEnded, None, None]:
    """As `compute_here`, with a FakeEngine in place of the model's."""
    root = Path(spec.store_root)
    store = ExpertStore.open(root)
    tokenizer = TextTokenizer.from_folder(root)
    settings = GatewaySettings.from_manifest(store.manifest, spec.model_name, 4096, 512, 0)
    with ExitStack() as stack:
        stack.callback(store.close)
        template = ChatTemplate.from_folder(root, tokenizer)
        preparer = stack.enter_context(closing(RowPreparer(settings, tokenizer, template, spec.defaults)))
        source = open_rows(spec.input_path, spec.input_format, spec.input_nbytes, spec.input_mtime_ns)
        reader = stack.enter_context(source)
        folder = OutputFolder(Path(spec.output_root))
        run = PartsRun(reader, preparer, tokenizer, engine or FakeEngine(), folder, NUMERICS_CLASS, 12)
        yield from run.summaries(parts)


def write_rows(path: Path, num_rows: int) -> Path:
    """JSON lines, every seventh of them a bad one."""
    rows = [
        {"id": f"r{n}", "prompt": f"Row {n}", "max_tokens": 1 + n % 5 if n % 7 else -1}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def _moments(on_moment: Callable[[], None]) -> Iterator[None]:
    """Call `on_moment` before and after everything that a kill could fall between."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            on_moment()
            result = function(*args, **kwargs)
            on_moment()
            return result

        return call

    with ExitStack() as stack:
        for owner, name in ((os, "rename"), (os, "fsync"), (os, "unlink"), (os, "mkdir")):
            stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
        stack.enter_context(mock.patch.object(batch_output, "open", watched(builtins.open), create=True))
        for engine in (FakeEngine, Engine):
            stack.enter_context(mock.patch.object(engine, "step", watched(engine.step)))
        yield


def _count_moments(options: BatchOptions, compute: Compute) -> int:
    count = 0

    def on_moment() -> None:
        nonlocal count
        count += 1

    with _moments(on_moment):
        run_batch(options, compute)
    return count


def _run_killed(options: BatchOptions, compute: Compute, moment: int) -> bool:
    """Whether the run was killed: one that goes on may be done before that moment."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def on_moment() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        code = 1
        try:
            with _moments(on_moment):
                run_batch(options, compute)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed instead of being killed"
    return os.WIFSIGNALED(status)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def main() -> None:
    """STORE WORK NUM_ROWS NUM_KILLS SEED fake|real: prints one JSON object with what was found."""
    store, work, num_rows, num_kills, seed, engine = sys.argv[1:]
    batch_plan.PART_ROWS = SMALL_PART_ROWS
    compute: Compute = compute_here if engine == "real" else fake_compute
    source = write_rows(Path(work) / "rows.jsonl", int(num_rows))
    reference = BatchOptions(Path(store), "tiny", source, Path(work) / "reference")
    num_moments = _count_moments(reference, compute)
    expected = _content(reference.output)
    chosen = random.Random(int(seed))
    num_killed = num_equal = 0
    moments = []
    while num_killed < int(num_kills):
        options = BatchOptions(Path(store), "tiny", source, Path(work) / f"output-{num_killed}")
        for _ in range(2):  # a run that goes on is killed, too
            moments.append(chosen.randrange(num_moments))
            num_killed += _run_killed(options, compute, moments[-1])
        run_batch(options, compute)
        num_equal += _content(options.output) == expected
        shutil.rmtree(options.output)
    found = {"moments": num_moments, "killed_at": moments, "killed": num_killed, "equal": num_equal}
    print(json.dumps(found | {"outputs": len(moments) // 2, "files": len(expected)}))


if __name__ == "__main__":
    main()
