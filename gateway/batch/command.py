"""The command `sage-moe batch`: options, progress and the last line. The work is `gateway.batch.job`'s."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from gateway.budget_options import ExpertBudgetOption, read_memory
from gateway.command_line import StoreArgument
from gateway.errors import BatchOutputRefused
from gateway.progress import shown_progress

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the command of a submitted job, whose current folder is a copy that goes away."""
ADDRESS_VARIABLE = "RAY_ADDRESS"


def batch(
    store: StoreArgument,
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

    from gateway.batch.job import BatchOptions, run_batch
    from gateway.batch.plan import RowDefaults
    from gateway.batch.ray_shell import compute_with_ray
    from gateway.service.launch import interruptible
    from gateway.stores.source import model_name, resolve_runnable

    defaults = RowDefaults(seed, max_tokens, temperature)
    name = served_model_name or model_name(store)
    root = resolve_runnable(store, announce=lambda line: typer.echo(line, err=True))
    budgets = read_memory(None, expert_budget, None, lambda line: typer.echo(line, err=True)).experts
    options = BatchOptions(root, name, input, output, dtype, defaults, budgets)
    try:
        with interruptible(), shown_progress("rows") as show:
            report = run_batch(options, partial(compute_with_ray, ray_address), show)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what {output} has", err=True)
        raise
    if report.ignored_columns:
        typer.echo(f"columns without a meaning here: {', '.join(report.ignored_columns)}", err=True)
    parts = "1 part" if report.num_parts == 1 else f"{report.num_parts} parts"
    typer.echo(
        f"{output}: {report.rows} rows in {parts}, {report.errors} with an error; "
        f"{report.prompt_tokens} prompt and {report.completion_tokens} completion tokens"
    )
