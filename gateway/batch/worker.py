"""Computes parts of a batch with one engine, whose batch stays full across rows and parts; knows nothing of Ray.

Rows join the engine in order and leave it as they end; a part is written when its last row has ended. A few hundred
rows' tokens are all that is held. Called by `gateway.batch.ray_shell`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from experts.store import ExpertStore
from gateway.batch.output import OutputFolder, PartSummary, ResultRow
from gateway.batch.plan import InputFormat, Part, RowDefaults, pending_parts
from gateway.batch.rows import PreparedRow, RowPreparer
from gateway.batch.source import RowReader, open_rows
from gateway.errors import BatchFailed, BatchOutputRefused
from gateway.http.settings import GatewaySettings
from gateway.http.stream import AnswerText
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.batcher import BatchLimits
from router.engine import EXPERT_FAILED
from router.errors import PromptInvalid, RequestTooLong
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest, TokenEvent

REPORT_INTERVAL_S = 1.0


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to compute any part of a job; plain data, for a process elsewhere."""

    store_root: str
    model_name: str
    dtype: str
    input_path: str
    input_format: InputFormat
    input_nbytes: int
    input_mtime_ns: int
    output_root: str
    defaults: RowDefaults
    expert_budget_bytes: int | None = None
    """Most bytes of experts that stay; None means no bound."""


@dataclass(frozen=True)
class RowsEnded:
    """Progress: so many more rows have ended, some of them in parts that are not written yet."""

    num_rows: int
    seconds: float
    """Since the report before, or the start."""


class BatchEngine(Protocol):
    """The part of `router.engine.Engine` that is used."""

    def submit(self, request: GenerationRequest) -> None: ...

    def step(self) -> list[TokenEvent]: ...

    def cancel(self, request_id: str) -> bool: ...


class BatchWorker:
    """A loaded model and an opened input and output."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Raises what loading the engine or opening the input raises."""
        with ExitStack() as stack:
            root = Path(spec.store_root)
            store = ExpertStore.open(root)
            stack.callback(store.close)
            self._tokenizer = TextTokenizer.from_folder(root)
            template = ChatTemplate.from_folder(root, self._tokenizer)
            stack.callback(template.close)
            options = EngineOptions(
                dtype=spec.dtype,
                expert_budget_bytes=spec.expert_budget_bytes,
                limits=BatchLimits(is_paced=False),
            )
            self.loaded: LoadedEngine = load_engine(store, options)
            stack.callback(self.loaded.directory.close)
            settings = batch_settings(spec, store, self.loaded)
            self._preparer = RowPreparer(settings, self._tokenizer, template, spec.defaults)
            stack.callback(self._preparer.close)
            opened = open_rows(spec.input_path, spec.input_format, spec.input_nbytes, spec.input_mtime_ns)
            self._reader: RowReader = stack.enter_context(opened)
            self._folder = OutputFolder(Path(spec.output_root))
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def run(self, parts: Sequence[Part]) -> Iterator[PartSummary | RowsEnded]:
        """Write the parts that are missing. Raises BatchFailed, BatchInputInvalid or BatchOutputRefused."""
        run = PartsRun(
            self._reader,
            self._preparer,
            self._tokenizer,
            self.loaded.engine,
            self._folder,
            self.loaded.numerics_class,
            2 * self.loaded.engine.limits.max_running,
        )
        return run.summaries(parts)


def batch_settings(spec: WorkerSpec, store: ExpertStore, loaded: LoadedEngine) -> GatewaySettings:
    """What the HTTP service would know of this model."""
    context = loaded.config.max_position_embeddings
    return GatewaySettings.from_manifest(
        store.manifest, spec.model_name, context, loaded.config.vocab_size, created=0
    )


class _OpenRow:
    """A row in the engine, and its text so far."""

    def __init__(self, row: PreparedRow, tokenizer: TextTokenizer) -> None:
        assert row.job is not None
        (choice,) = row.job.choices
        self.row, self.request = row, choice.request
        sampling = choice.request.sampling
        self._text = AnswerText(
            tokenizer.detokenizer(),
            {*sampling.stop_token_ids, *tokenizer.special_tokens},
            row.job.stops,
            min_tokens=sampling.min_tokens,
        )
        self._pieces: list[str] = []

    def push(self, event: TokenEvent) -> ResultRow | None:
        """The result once the row has ended, by the engine or by a stop string."""
        if event.finish_reason == "error":
            return ResultRow(self.row.index, self.row.id, error=f"Generation failed: {event.error}")
        self._pieces.append(self._text.push(event.token_ids))
        if event.finish_reason is None and not self._text.is_stopped:
            return None
        self._pieces.append(self._text.flush())
        reason = "stop" if self._text.is_stopped else event.finish_reason
        num_prompt = len(self.request.prompt_ids)
        return ResultRow(
            self.row.index, self.row.id, "".join(self._pieces), reason, num_prompt, self._text.num_tokens
        )


class PartsRun:
    """One pass over parts."""

    def __init__(
        self,
        reader: RowReader,
        preparer: RowPreparer,
        tokenizer: TextTokenizer,
        engine: BatchEngine,
        folder: OutputFolder,
        numerics_class: str,
        max_open: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_open: rows that the engine holds at once, running and waiting."""
        self._reader, self._preparer, self._tokenizer = reader, preparer, tokenizer
        self._engine, self._folder, self._numerics_class = engine, folder, numerics_class
        self._max_open, self._clock = max_open, clock
        self._open: dict[str, _OpenRow] = {}
        self._missing: dict[int, int] = {}
        """Rows that have not ended, by part."""
        self._results: dict[int, dict[int, ResultRow]] = {}
        self._part_of: dict[int, Part] = {}
        """Of rows that have not ended."""
        self._num_ended = 0
        self._reported_at = clock()

    def summaries(self, parts: Sequence[Part]) -> Iterator[PartSummary | RowsEnded]:
        """See BatchWorker.run."""
        there = self._folder.part_files()
        if there:
            self._check_class(self._folder.read_any_summary(there[0]))
        rows = self._rows(pending_parts(parts, there))
        is_drained = False
        while not is_drained or self._open:
            while not is_drained and len(self._open) < self._max_open:
                row = next(rows, None)
                if row is None:
                    is_drained = True
                else:
                    yield from self._written(self._admit(row))
            if self._open:
                for event in self._engine.step():
                    yield from self._written(self._take(event))
            if self._num_ended and self._clock() - self._reported_at >= REPORT_INTERVAL_S:
                yield self._report()
        if self._num_ended:
            yield self._report()

    def _rows(self, parts: Sequence[Part]) -> Iterator[PreparedRow]:
        for part in parts:
            self._missing[part.number], self._results[part.number] = part.num_rows, {}
            for row in self._reader.rows(part):
                self._part_of[row.index] = part
                yield self._preparer.prepare(row)

    def _admit(self, row: PreparedRow) -> ResultRow | None:
        """Hand a row to the engine; the result where it cannot be run."""
        if row.job is None:
            return ResultRow(row.index, row.id, error=row.error)
        name = f"row-{row.index}"
        open_row = _OpenRow(row, self._tokenizer)
        try:
            self._engine.submit(replace(open_row.request, request_id=name))
        except (RequestTooLong, PromptInvalid) as error:
            return ResultRow(row.index, row.id, error=str(error))
        self._open[name] = open_row
        return None

    def _take(self, event: TokenEvent) -> ResultRow | None:
        """Pass an event to its row; the result where it has ended."""
        if event.error == EXPERT_FAILED:
            # Not the row's fault: an error in its place would stay there for ever.
            raise BatchFailed(f"row {event.request_id.removeprefix('row-')}: {event.error}")
        row = self._open.get(event.request_id)
        if row is None:
            return None
        result = row.push(event)
        if result is not None:
            del self._open[event.request_id]
            if event.finish_reason is None:
                self._engine.cancel(event.request_id)
        return result

    def _written(self, result: ResultRow | None) -> Iterator[PartSummary]:
        """Keep a result, and write its part when it was the last."""
        if result is None:
            return
        part = self._part_of.pop(result.index)
        self._results[part.number][result.index] = result
        self._num_ended += 1
        self._missing[part.number] -= 1
        if not self._missing[part.number]:
            rows = self._results.pop(part.number)
            del self._missing[part.number]
            yield self._folder.write_part(part, [rows[i] for i in sorted(rows)], self._numerics_class)

    def _report(self) -> RowsEnded:
        now = self._clock()
        report = RowsEnded(self._num_ended, now - self._reported_at)
        self._num_ended, self._reported_at = 0, now
        return report

    def _check_class(self, summary: PartSummary) -> None:
        if summary.numerics_class != self._numerics_class:
            raise BatchOutputRefused(
                str(self._folder.root),
                f"was begun with {summary.numerics_class} and this machine computes with {self._numerics_class}, "
                "which gives other bits; finish it there or choose another folder",
            )
