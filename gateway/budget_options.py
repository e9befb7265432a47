"""`--expert-budget` and `--host-budget`, as the commands share them. Values are read by `gateway.byte_sizes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from cluster.memory_plan import MemoryPlan
    from experts.budget import BudgetRequest

ONE_MEMORY_NOTICE = (
    "note: experts are computed in host memory on this machine: "
    "--host-budget and --expert-budget are one budget"
)
ExpertBudgetOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        metavar="SIZE|PERCENT|fit",
        help="Memory for experts on each node: 2GiB, 25% of all experts, or what fits. [fit]",
    ),
]
HostBudgetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="SIZE|PERCENT|fit",
        help="The same for host memory behind a device; without one it is added to --expert-budget.",
    ),
]


def read_budgets(
    expert_budget: str | None, host_budget: str | None, announce: Callable[[str], None]
) -> tuple[BudgetRequest, ...]:
    """For commands without a config file. announce: takes a line about a budget that means another here.

    Raises OptionInvalid.
    """
    from gateway.service_options import merge_values, one_memory

    given = {"expert-budget": expert_budget, "host-budget": host_budget}
    values = merge_values(given, {}, "")
    if values.host_budget is not None:
        announce(ONE_MEMORY_NOTICE)
    return one_memory(values.expert_budget, values.host_budget)


def print_plan(plan: MemoryPlan) -> None:
    """On stderr, so that what a command answers stays alone on stdout."""
    from rich.console import Console

    from gateway.memory_view import render_memory

    Console(stderr=True, highlight=False).print(render_memory(plan.as_json()))
