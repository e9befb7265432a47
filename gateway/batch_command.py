"""The command `sage-moe batch`: options, progress and the last line. The work is `gateway.batch_job`'s."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from gateway.budget_options import ExpertBudgetOption, read_budgets
from gateway.errors import BatchOutputRefused

LINE_INTERVAL_S = 5.0
"""Between two lines of progress where stderr is no terminal."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the command of a submitted job, whose current folder is a copy that goes away."""
ADDRESS_VARIABLE = "RAY_ADDRESS"


def batch(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="An expert store, a checkpoint folder, or a bundled model.")
    ],
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="Rows to run: .jsonl or .parquet.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder for the answers; goes on where it was stopped.")
    ],
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(min=1, help="For rows without their own; default: as over HTTP."),
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, max=2.0, help="For rows without their own; default: the checkpoint's."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="With a row's index, gives the seed of rows without their own.")
    ] = 0,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32 or bfloat16; default: as stored."),
    ] = None,
    expert_budget: ExpertBudgetOption = None,
    served_model_name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What rows that name a model must name; default: the store's."),
    ] = None,
    ray_address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar=ADDRESS_VARIABLE, help="A running Ray; default: one is started on this machine."),
    ] = None,
) -> None:
    """Run every row of a file through a model, each exactly once."""
    if os.environ.get(JOB_VARIABLE) and not output.is_absolute():
        reason = "is relative to a copy that goes away with the job; give an absolute path"
        raise BatchOutputRefused(str(output), reason)

    from gateway.batch_job import BatchOptions, run_batch
    from gateway.batch_plan import RowDefaults
    from gateway.batch_ray import compute_with_ray
    from gateway.launch import interruptible
    from gateway.store_source import model_name, resolve_runnable

    defaults = RowDefaults(seed, max_tokens, temperature)
    name = served_model_name or model_name(store)
    root = resolve_runnable(store, announce=lambda line: typer.echo(line, err=True))
    budgets = read_budgets(expert_budget, None, lambda line: typer.echo(line, err=True))
    options = BatchOptions(root, name, input, output, dtype, defaults, budgets)
    try:
        with interruptible(), _progress() as show:
            report = run_batch(options, partial(compute_with_ray, ray_address), show)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what {output} has", err=True)
        raise
    if report.ignored_columns:
        typer.echo(f"columns without a meaning here: {', '.join(report.ignored_columns)}", err=True)
    typer.echo(
        f"{output}: {report.rows} rows in {report.num_parts} parts, {report.errors} with an error; "
        f"{report.prompt_tokens} prompt and {report.completion_tokens} completion tokens"
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and remaining time on a terminal, else a line now and then; both on stderr."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(time.monotonic, lambda line: typer.echo(line, err=True)).show
        return
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("rows"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ProgressLines:
    """Plain lines: the first and the last report, and others LINE_INTERVAL_S apart."""

    def __init__(self, clock: Callable[[], float], write: Callable[[str], None]) -> None:
        self._clock, self._write = clock, write
        self._started_at: float | None = None
        self._shown_at = 0.0
        self._first_done = 0

    def show(self, done: int, total: int) -> None:
        """done: rows that have ended, those of earlier runs included."""
        now = self._clock()
        if self._started_at is None:
            self._started_at, self._first_done = now, done
        elif done < total and now - self._shown_at < LINE_INTERVAL_S:
            return
        self._shown_at = now
        self._write(f"{done} of {total} rows{self._rate(done, total, now - self._started_at)}")

    def _rate(self, done: int, total: int, elapsed_s: float) -> str:
        new = done - self._first_done
        if new <= 0 or elapsed_s <= 0.0:
            return ""
        rate = new / elapsed_s
        left = f", about {(total - done) / rate / 60:.1f} min left" if done < total else ""
        return f", {rate:.1f} rows/s{left}"
