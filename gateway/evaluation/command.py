"""The command `sage-moe eval`: options, progress, and what is printed. The work is `gateway.evaluation.run`'s."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer

from gateway.budget_options import DeviceOption, HostBudgetOption, read_memory
from gateway.command_line import StoreArgument, announce
from gateway.local.study_options import MaskOption, ReplayOption, TraceOption
from gateway.progress import shown_progress

if TYPE_CHECKING:
    from gateway.evaluation.run import EvalOptions, Evaluation

OutputOption = Optional[Path]  # noqa: UP045 - typer reads the annotation at run time


def evaluate(
    store: StoreArgument,
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files.")],
    policy: Annotated[str, typer.Option(metavar="native|snarc", help="Who chooses experts.")] = "native",
    effort: Annotated[
        str,
        typer.Option(metavar="wake|focus|crisis|auto", help="Experts per token; focus is the model's own."),
    ] = "focus",
    snarc: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="WEIGHTS", help="Of the snarc policy: a preset, NAME=VALUE,... or both."),
    ] = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--budget",
            "--expert-budget",
            metavar="SIZE|PERCENT|fit",
            help="Memory for experts; default: all of them may stay.",
        ),
    ] = None,
    eviction: Annotated[
        str, typer.Option(metavar="NAME", help="Which expert goes first: lfu, lru or trust.")
    ] = "lfu",
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Tokens that a window scores; default: half the context."),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Of each text, the first so many tokens."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, max=512, help="Token rows in a step; 1 needs experts as decode does.")
    ] = 512,
    one_stream: Annotated[
        bool,
        typer.Option(
            "--one-stream",
            help="Route and count token by token, as one stream that decodes with a cache of the budget's size.",
        ),
    ] = False,
    device: DeviceOption = None,
    host_budget: HostBudgetOption = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32 or bfloat16; default: as stored."),
    ] = None,
    mask_experts: MaskOption = None,
    replay_routing: ReplayOption = None,
    trace: TraceOption = None,
    parquet: Annotated[
        OutputOption, typer.Option(metavar="FILE", help="Write one row a window, with every logprob.")
    ] = None,
    plot: Annotated[
        OutputOption,
        typer.Option(metavar="FILE.png", help="Draw use of experts and misses (needs matplotlib)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's perplexity over texts, and what its experts cost."""
    from gateway.evaluation.run import EvalOptions
    from gateway.evaluation.windows import Sliding
    from gateway.local.study import Study
    from gateway.output_file import check_output
    from gateway.service.option_values import parse_eviction
    from gateway.stores.source import resolve_runnable
    from router.effort import EFFORT_CHOICES
    from router.routing_choice import POLICIES, RoutingChoice
    from router.scoring import DEFAULT_PRESET, read_weights

    sliding = Sliding(context, max(1, context // 2) if stride is None else stride)
    study = Study(trace, mask_experts, replay_routing)
    routing = RoutingChoice(
        _one_of("--policy", policy, POLICIES), _one_of("--effort", effort, EFFORT_CHOICES)
    )
    for path in (trace, parquet, plot):
        if path is not None:
            check_output(path)
    if plot is not None:
        from gateway.evaluation.plots import check_plots

        check_plots()
    root = resolve_runnable(store, announce=announce)
    memory = read_memory(device, budget, host_budget, announce)
    weights = read_weights(DEFAULT_PRESET if snarc is None else snarc)
    options = EvalOptions(
        sliding,
        batch_tokens,
        memory.experts,
        parse_eviction(eviction),
        dtype,
        routing,
        weights,
        study,
        one_stream,
        memory.device,
        memory.host,
    )
    with tempfile.TemporaryDirectory(prefix="sage-moe-eval-") as folder:
        if plot is not None and trace is None:
            options = replace(options, study=replace(study, trace=Path(folder) / "trace.parquet"))
        evaluation = _run(root, texts, max_tokens, options)
        _print(evaluation, as_json)  # first: what took hours is not lost where a file cannot be written
        _write(evaluation, parquet, plot)
        if evaluation.trace_failure is not None:
            raise evaluation.trace_failure


Choice = TypeVar("Choice", bound=str)


def _one_of(option: str, value: str, choices: Sequence[Choice]) -> Choice:
    for choice in choices:
        if value == choice:
            return choice
    from gateway.errors import OptionInvalid

    raise OptionInvalid(option, f"must be one of {', '.join(choices)}, not {value[:40]!r}")


def _run(root: Path, texts: list[Path], max_tokens: int | None, options: EvalOptions) -> Evaluation:
    from gateway.evaluation.run import evaluate as run
    from gateway.evaluation.run import read_texts

    with shown_progress("tokens") as show:
        return run(root, partial(read_texts, paths=texts, max_tokens=max_tokens), options, show)


def _write(evaluation: Evaluation, parquet: Path | None, plot: Path | None) -> None:
    from gateway.evaluation.report import windows_parquet
    from gateway.output_file import write_output

    if parquet is not None:
        write_output(parquet, windows_parquet(evaluation))
    if plot is not None and evaluation.trace_failure is None:
        from gateway.evaluation.page import draw_page

        assert evaluation.options.study.trace is not None
        write_output(plot, draw_page(evaluation, evaluation.options.study.trace))


def _print(evaluation: Evaluation, is_json: bool) -> None:
    from rich.console import Console

    from gateway.evaluation import report as eval_report

    report: dict[str, Any] = eval_report.as_json(evaluation)
    if is_json:
        typer.echo(json.dumps(report))
    else:
        Console(highlight=False).print(eval_report.render(report))
