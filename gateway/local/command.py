"""`sage-moe generate`: one generation in this process, without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from gateway.budget_options import (
    DeviceOption,
    ExpertBudgetOption,
    HostBudgetOption,
    SpeechBudgetOption,
    SpeechFramesOption,
    VoiceOption,
    print_plan,
    read_memory,
    read_speech_choice,
)
from gateway.command_line import StoreArgument, announce
from gateway.local.study_options import MaskOption, ReplayOption, TraceOption

DtypeOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(help="float32 or bfloat16; default: as stored."),
]


def generate(
    store: StoreArgument,
    prompt: Annotated[Optional[str], typer.Option(help="Text to continue.")] = None,  # noqa: UP045
    prompt_ids: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ID,ID,...", help="Token ids to continue, instead of --prompt."),
    ] = None,
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="FILE", help="A PNG, JPEG or WebP image before --prompt; may be repeated."),
    ] = None,
    audio: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="FILE", help="A WAV file before --prompt; may be repeated."),
    ] = None,
    speech: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Speak the answer to --prompt: a WAV file to write."),
    ] = None,
    voice: VoiceOption = None,
    max_speech_frames: SpeechFramesOption = None,
    speech_budget: SpeechBudgetOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, max=2.0, help="0 is greedy; default: the checkpoint's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the sampling noise.")] = 0,
    json_schema: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Answer with JSON that follows this schema."),
    ] = None,
    dtype: DtypeOption = None,
    trace: TraceOption = None,
    mask_experts: MaskOption = None,
    replay_routing: ReplayOption = None,
    eviction: Annotated[
        str, typer.Option(metavar="NAME", help="Which expert goes first: lfu, lru or trust.")
    ] = "lfu",
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch/--no-prefetch", help="Read experts ahead by the next layer's gate. [--no-prefetch]"
        ),
    ] = False,
    device: DeviceOption = None,
    expert_budget: ExpertBudgetOption = None,
    host_budget: HostBudgetOption = None,
    policy: Annotated[str, typer.Option(help="Routing: native or snarc.")] = "native",
    effort: Annotated[str, typer.Option(help="Experts per token: wake, focus, crisis or auto.")] = "focus",
    snarc: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="WEIGHTS", help="Of the snarc policy: a preset, NAME=VALUE,... or both."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="With --json: why every token got its experts.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is generated.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust/--no-trust", help="Learn about experts and keep it. [--no-trust]")
    ] = False,
    state_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Where it is kept. [~/.local/state/sage-moe]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate once in this process, without Ray. With --image, --audio or --speech the prompt is a turn of a
    conversation."""
    if stream and as_json:
        raise typer.BadParameter("choose one of --stream and --json")
    if explain and not as_json:
        raise typer.BadParameter("--explain goes with --json")
    chosen_prompt = _chosen_prompt(prompt, prompt_ids)
    if (image or audio) and prompt is None:
        raise typer.BadParameter("--image and --audio go with --prompt")
    if speech is not None and prompt is None:
        raise typer.BadParameter("--speech goes with --prompt")
    if speech is not None and json_schema is not None:
        raise typer.BadParameter("choose one of --speech and --json-schema")
    wish = read_speech_choice(speech is not None, voice, max_speech_frames, speech_budget)

    from gateway.http.routing_rules import read_choice
    from gateway.local.generate import generate as run
    from gateway.local.json_schema import read_grammar
    from gateway.local.media_prompt import MediaFiles
    from gateway.local.study import Study
    from gateway.output_file import check_output
    from gateway.service.option_values import parse_eviction
    from gateway.service.state_folder import resolve_state_folder
    from gateway.stores.source import resolve_runnable
    from router.loading import EngineOptions
    from router.means_keeper import StandInOptions
    from router.scoring import DEFAULT_PRESET, read_weights
    from router.trust_options import TrustOptions

    if speech is not None:
        check_output(speech)
    study = Study(trace, mask_experts, replay_routing)
    routing = read_choice(policy, effort, is_explained=explain)
    weights = read_weights(DEFAULT_PRESET if snarc is None else snarc)
    learning = TrustOptions(str(resolve_state_folder(state_dir))) if trust else None
    kept_in = learning.state_folder if learning is not None else None
    memory = read_memory(device, expert_budget, host_budget, announce)
    options = EngineOptions(
        dtype=dtype,
        efforts=(routing.effort,),
        device=memory.device,
        eviction=parse_eviction(eviction),
        prefetch=prefetch,
        snarc=weights,
        stand_ins=StandInOptions(kept_in) if routing.policy == "snarc" else None,
        trust=learning,
    )
    sampling: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed}
    if temperature is not None:
        sampling["temperature"] = temperature
    if json_schema is not None:
        sampling["grammar"] = read_grammar(json_schema)
    show = _write_at_once if stream else _keep_quiet
    is_asked = expert_budget is not None or host_budget is not None or memory.device.type != "cpu"
    result = run(
        resolve_runnable(store, announce=announce),
        chosen_prompt,
        sampling,
        options,
        routing=routing,
        budgets=memory.experts,
        host_budgets=memory.host,
        study=study,
        files=MediaFiles(tuple(image or ()), tuple(audio or ())),
        speech=wish,
        on_text=show,
        on_plan=print_plan if is_asked else _keep_quiet,
    )
    if as_json:
        typer.echo(json.dumps(result.as_json(), ensure_ascii=False))
    else:
        typer.echo("" if stream else _for_output(result.text))
    if speech is not None and result.spoken is not None:
        result.spoken.save(speech)
    if result.failure is not None:
        raise result.failure


def _chosen_prompt(prompt: str | None, prompt_ids: str | None) -> str | tuple[int, ...]:
    if (prompt is None) == (prompt_ids is None):
        raise typer.BadParameter("give exactly one of --prompt and --prompt-ids")
    if prompt is not None:
        return _checked_text(prompt)
    try:
        return tuple(int(part) for part in str(prompt_ids).split(","))
    except ValueError as error:
        raise typer.BadParameter("--prompt-ids takes whole numbers separated by commas") from error


def _checked_text(text: str) -> str:
    """Bytes of an argument that are no UTF-8 come in as halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"--prompt is not UTF-8 at character {error.start}") from error
    return text


def _write_at_once(text: str) -> None:
    sys.stdout.write(_for_output(text))
    sys.stdout.flush()


def _for_output(text: str) -> str:
    """A model's text without what would move a terminal's cursor; to a file or pipe, as it is."""
    from gateway.text.terminal_text import safe_text

    return safe_text(text) if sys.stdout.isatty() else text


def _keep_quiet(_: object) -> None:
    """For answers that are printed at the end, and plans that nobody asked for."""
