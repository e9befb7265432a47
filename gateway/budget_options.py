"""`--device`, `--expert-budget` and `--host-budget`, as the commands share them.

Sizes are read by `gateway.byte_sizes`, devices by `experts.devices`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    import torch

    from cluster.memory_plan import MemoryPlan
    from experts.budget import BudgetRequest
    from gateway.local.speech import SpeechChoice
    from gateway.service.option_values import OptionValues

ONE_MEMORY_NOTICE = (
    "note: experts are computed in host memory on this machine: "
    "--host-budget and --expert-budget are one budget"
)
ExpertBudgetOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        metavar="SIZE|PERCENT|fit",
        help="Memory for experts on each node: 2GiB, 25% of all experts, or what fits. \\[fit]",
    ),
]
HostBudgetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="SIZE|PERCENT|fit",
        help="The same for host memory behind a device; without one it is added to --expert-budget.",
    ),
]
SpeechBudgetOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="SIZE|PERCENT",
        help="Memory for the experts that speak: 1GiB, or 25% of them. \\[all of them]",
    ),
]
VoiceOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="With --speech: who speaks; a name that is none lists them."),
]
SpeechFramesOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, metavar="FRAMES", help="With --speech: most of an answer, 25 in two seconds. \\[the model's]"
    ),
]
DeviceOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="cpu|cuda|cuda:N|auto", help="What computes; auto is a GPU where PyTorch sees one. \\[cpu]"
    ),
]


@dataclass(frozen=True)
class ChosenMemory:
    """Which device computes, and what was asked for of its memory and of the host's behind it."""

    device: torch.device
    experts: tuple[BudgetRequest, ...]
    host: tuple[BudgetRequest, ...] = ()
    """Nothing where host memory is what computes: it is then asked for with `experts`."""


def read_memory(
    device: str | None, expert_budget: str | None, host_budget: str | None, announce: Callable[[str], None]
) -> ChosenMemory:
    """For commands without a config file. announce: takes a line about a budget that means another here.

    Raises OptionInvalid or DeviceUnavailable.
    """
    from gateway.service.option_values import merge_values

    given = {"device": device, "expert-budget": expert_budget, "host-budget": host_budget}
    return choose_memory(merge_values(given, {}, ""), announce)


def read_speech_choice(
    is_spoken: bool, voice: str | None, max_frames: int | None, budget: str | None
) -> SpeechChoice | None:
    """What goes with `--speech`; None without it. Raises OptionInvalid, BadParameter."""
    from gateway.local.speech import SpeechChoice
    from gateway.service.option_values import merge_values

    if is_spoken:
        return SpeechChoice(voice, max_frames, merge_values({"speech-budget": budget}, {}, "").speech_budget)
    if any(option is not None for option in (voice, max_frames, budget)):
        raise typer.BadParameter("--voice, --max-speech-frames and --speech-budget go with --speech")
    return None


def choose_memory(values: OptionValues, announce: Callable[[str], None]) -> ChosenMemory:
    """Raises DeviceUnavailable."""
    from experts.devices import resolve_device
    from gateway.service.options import computes_on_cards, tiers

    device = resolve_device(values.device)
    is_on_card = computes_on_cards(values, device)
    if not is_on_card and values.host_budget is not None:
        announce(ONE_MEMORY_NOTICE)
    return ChosenMemory(device, *tiers(is_on_card, values.expert_budget, values.host_budget))


def print_plan(plan: MemoryPlan) -> None:
    """On stderr, so that what a command answers stays alone on stdout."""
    from rich.console import Console

    from gateway.service.memory_view import render_memory

    Console(stderr=True, highlight=False).print(render_memory(plan.as_json()))
