"""`sage-moe serve`: gathers the options, then starts the service or, for --dry-run, says what would be started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cluster.light_start import starting_lightly
from gateway.budget_options import (
    DeviceOption,
    ExpertBudgetOption,
    HostBudgetOption,
    SpeechBudgetOption,
    choose_memory,
    print_plan,
)
from gateway.command_line import StoreArgument, announce

if TYPE_CHECKING:
    from cluster.memory_plan import MemoryPlan
    from gateway.service.options import ServiceOptions
    from gateway.service.placing import Placed

Number = Optional[int]  # noqa: UP045 - typer reads the annotation at run time
Word = Optional[str]  # noqa: UP045
Words = Optional[list[str]]  # noqa: UP045


def serve(
    store: StoreArgument,
    host: Annotated[
        Word, typer.Option(help="Address to bind; beyond loopback needs a key. [127.0.0.1]")
    ] = None,
    port: Annotated[Number, typer.Option(help="Port to bind. [8000]")] = None,
    address: Annotated[
        Word,
        typer.Option(
            metavar="auto|HOST:PORT", help="Of a running Ray cluster; default: one is started here."
        ),
    ] = None,
    actors: Annotated[
        Number,
        typer.Option(
            help="Expert actors with equal groups; 0 computes all in the router's process. [0; with --address: by the "
            "machines]"
        ),
    ] = None,
    replicas: Annotated[
        Number, typer.Option(help="With --address: most actors of a group, where memory is left. [2]")
    ] = None,
    grouping: Annotated[
        Word,
        typer.Option(
            help="With --address: expert deals each layer out to all machines, layer whole layers. \\[expert]"
        ),
    ] = None,
    demand: Annotated[
        Word,
        typer.Option(
            metavar="TRACE", help="With --address: a routing trace that tells how often experts are used."
        ),
    ] = None,
    autoscale: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--autoscale/--no-autoscale", help="Let the number of actors follow the load. \\[off]"),
    ] = None,
    min_actors: Annotated[Number, typer.Option(help="Fewest, with --autoscale. [0]")] = None,
    max_actors: Annotated[Number, typer.Option(help="Most, with --autoscale. [--actors; placed: 64]")] = None,
    routers: Annotated[
        Number, typer.Option(help="Routers that share the expert actors, each with a cache of its own. [1]")
    ] = None,
    resume_timeout: Annotated[
        Number,
        typer.Option(
            metavar="SECONDS", help="How long an answer waits for another router when its own is lost. [60]"
        ),
    ] = None,
    dtype: Annotated[Word, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    served_model_name: Annotated[
        Words,
        typer.Option(help="Name in the API; repeatable, answers carry the first. Default: the store's."),
    ] = None,
    max_model_len: Annotated[
        Number, typer.Option(metavar="TOKENS", help="Most tokens of prompt and answer; default: the model's.")
    ] = None,
    max_num_seqs: Annotated[Number, typer.Option(help="Requests computed at the same time. [64]")] = None,
    max_queue: Annotated[Number, typer.Option(help="Requests that wait; more get 429. [256]")] = None,
    max_batch_tokens: Annotated[Number, typer.Option(help="Token rows in a step. [2048]")] = None,
    kv_budget: Annotated[
        Word, typer.Option(metavar="SIZE", help="Memory for keys and values, such as 512MiB. [1GiB]")
    ] = None,
    eviction: Annotated[
        Word, typer.Option(metavar="NAME", help="Which expert goes first: lfu, lru or trust. \\[lfu]")
    ] = None,
    prefetch: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--prefetch/--no-prefetch", help="Read experts ahead by the next layer's gate. [--no-prefetch]"
        ),
    ] = None,
    capacity: Annotated[
        Word, typer.Option(metavar="MODE", help="auto gives experts' memory back when idle. \\[fixed]")
    ] = None,
    audit_share: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="SHARE", help="Part of actors' answers that is computed twice. [0.0001]"),
    ] = None,
    device: DeviceOption = None,
    expert_device: Annotated[
        Word, typer.Option(metavar="cpu|cuda|auto", help="What computes in expert actors. \\[cpu]")
    ] = None,
    expert_budget: ExpertBudgetOption = None,
    host_budget: HostBudgetOption = None,
    store_copy: Annotated[
        Words,
        typer.Option(metavar="FOLDER", help="A copy of the store, read where the store fails; repeatable."),
    ] = None,
    store_cache: Annotated[
        Word,
        typer.Option(
            metavar="DIR", help="Where machines without the store keep what they fetch (docs/weights.md)."
        ),
    ] = None,
    store_cache_limit: Annotated[
        Word, typer.Option(metavar="SIZE", help="Most bytes of records in it, on each machine. \\[none]")
    ] = None,
    api_key: Annotated[
        Words, typer.Option(metavar="KEY|@FILE", help="Key that clients must send; repeatable.")
    ] = None,
    api_key_file: Annotated[
        Words, typer.Option(metavar="FILE", help="Keys, one a line; not readable by others. Repeatable.")
    ] = None,
    cors_origin: Annotated[
        Words, typer.Option(metavar="ORIGIN", help="Web origin whose pages may call, or *; repeatable.")
    ] = None,
    trace: Annotated[
        Word,
        typer.Option(metavar="DIR", help="Write which experts each token was given (docs/trace-format.md)."),
    ] = None,
    trace_tokens: Annotated[
        bool, typer.Option("--trace-tokens", help="Traces hold token ids too: they give prompts away.")
    ] = False,
    policy: Annotated[
        Word, typer.Option(help="Routing unless asked otherwise: native or snarc. \\[native]")
    ] = None,
    effort: Annotated[
        Word, typer.Option(help="Experts per token: wake, focus, crisis or auto. \\[focus]")
    ] = None,
    allow_policy: Annotated[
        Words, typer.Option(metavar="POLICY,...", help="Policies that requests may ask for beside native.")
    ] = None,
    allow_effort: Annotated[
        Words, typer.Option(metavar="EFFORT,...", help="Efforts that requests may ask for beside focus.")
    ] = None,
    snarc: Annotated[
        Word, typer.Option(metavar="WEIGHTS", help="Of the snarc policy: a preset, NAME=VALUE,... or both.")
    ] = None,
    trust: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--trust/--no-trust", help="Learn which experts to trust. [--trust]"),
    ] = None,
    prefix_cache: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Compute what prompts of one API key have in common at their beginnings once. [--prefix-cache]",
        ),
    ] = None,
    media: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--media/--no-media", help="Take images and sound where the model does. [--media]"),
    ] = None,
    speech: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--speech/--no-speech", help="Speak answers where the model does. [--speech]"),
    ] = None,
    speech_budget: SpeechBudgetOption = None,
    state_dir: Annotated[
        Word, typer.Option(metavar="FOLDER", help="Where it is kept. [~/.local/state/sage-moe]")
    ] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="YAML with these options' names; the command line goes first."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and start nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print JSON in place of YAML.")
    ] = False,
) -> None:
    """Serve a store over HTTP until interrupted."""
    if as_json and not dry_run:
        raise typer.BadParameter("--json goes with --dry-run")
    given = {
        "host": host,
        "port": port,
        "address": address,
        "actors": actors,
        "replicas": replicas,
        "grouping": grouping,
        "demand": demand,
        "autoscale": autoscale,
        "min-actors": min_actors,
        "max-actors": max_actors,
        "routers": routers,
        "resume-timeout": resume_timeout,
        "dtype": dtype,
        "served-model-name": served_model_name or None,
        "max-model-len": max_model_len,
        "max-num-seqs": max_num_seqs,
        "max-queue": max_queue,
        "max-batch-tokens": max_batch_tokens,
        "kv-budget": kv_budget,
        "eviction": eviction,
        "prefetch": prefetch,
        "capacity": capacity,
        "audit-share": audit_share,
        "device": device,
        "expert-device": expert_device,
        "expert-budget": expert_budget,
        "host-budget": host_budget,
        "store-copy": store_copy or None,
        "store-cache": store_cache,
        "store-cache-limit": store_cache_limit,
        "api-key": api_key or None,
        "api-key-file": api_key_file or None,
        "cors-origin": cors_origin or None,
        "trace": trace,
        "trace-tokens": trace_tokens or None,
        "policy": policy,
        "effort": effort,
        "allow-policy": allow_policy or None,
        "allow-effort": allow_effort or None,
        "snarc": snarc,
        "trust": trust,
        "prefix-cache": prefix_cache,
        "media": media,
        "speech": speech,
        "speech-budget": speech_budget,
        "state-dir": state_dir,
    }
    if not dry_run and any(not key.startswith("@") for key in api_key or ()):
        _move_keys_out_of_sight(api_key or ())
    with starting_lightly():  # nearly all of it is imports
        options = _gather(store, given, config)
        import gateway.service.launch  # noqa: F401
    if dry_run:
        _print_plan(options, as_json)
    else:
        _serve(options)


def _gather(store: str, given: dict[str, Any], config: Path | None) -> ServiceOptions:
    from gateway.http.api_keys import (
        KEYS_VARIABLE,
        KeyRing,
        keys_of_environment,
        keys_of_option,
        read_key_file,
    )
    from gateway.service.config_file import read_config
    from gateway.service.option_values import merge_values
    from gateway.service.options import compose_options
    from gateway.stores.source import model_name, resolve_runnable

    file = read_config(config) if config else {}
    values = merge_values(given, file, str(config))
    choose_memory(values, announce)
    keys = [key for option in values.api_key for key in keys_of_option(option)]
    keys += [key for path in values.api_key_file for key in read_key_file(path)]
    keys += keys_of_environment(os.environ)
    os.environ.pop(KEYS_VARIABLE, None)  # Ray's processes would inherit it
    return compose_options(
        values, resolve_runnable(store, announce=announce), model_name(store), KeyRing.of(keys)
    )


def _move_keys_out_of_sight(keys: Sequence[str]) -> None:
    """Begin anew with the keys in the environment: the command line is readable by every user of the machine, and
    Ray keeps it with its job."""
    from gateway.http.api_keys import KEYS_VARIABLE, keys_of_environment, keys_of_option

    found = [key for option in keys for key in keys_of_option(option)]
    found += keys_of_environment(os.environ)
    sys.stderr.write(
        "note: --api-key KEY shows the key to this machine's users; better --api-key-file FILE\n"
    )
    sys.stderr.flush()
    command = without_option(sys.orig_argv, "--api-key")
    os.execve(sys.executable, [sys.executable, *command[1:]], os.environ | {KEYS_VARIABLE: ",".join(found)})


def without_option(command: Sequence[str], option: str) -> list[str]:
    """The command without an option and its value, in both of its spellings."""
    kept, is_value = [], False
    for word in command:
        if is_value:
            is_value = False
        elif word == option:
            is_value = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def _print_plan(options: ServiceOptions, as_json: bool) -> None:
    import yaml

    from gateway.service.launch import describe_plan

    plan = describe_plan(options)
    if as_json:
        typer.echo(json.dumps(plan, indent=2, ensure_ascii=False))
    else:
        typer.echo(yaml.safe_dump(_in_few_lines(plan), sort_keys=False, allow_unicode=True), nl=False)


def _in_few_lines(value: Any) -> Any:
    """Lists of experts, which are long, as `0-13, 15`; JSON has the numbers."""
    from cluster.expert_names import ranges

    if isinstance(value, Mapping):
        return {key: _in_few_lines(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if value and all(type(item) is int for item in value):
        return ranges(value)
    return [_in_few_lines(item) for item in value]


def _serve(options: ServiceOptions) -> None:
    from gateway.service.launch import interruptible, running_service, wait_while_served

    if options.num_actors and options.device.type != options.expert_device:
        announce(
            f"note: the router computes on {options.device.type}, expert actors on {options.expert_device}: rows of "
            "two numerics classes, equal within a tolerance only, see docs/exactness.md"
        )
    with interruptible():
        try:
            with running_service(options, _print_memory, _print_placement) as url:
                names = " and ".join([options.model_name, *options.model_aliases])
                # From the moment that it is announced, stopping it is no failure.
                with suppress(KeyboardInterrupt):
                    typer.echo(f"{names} is served at {url}/v1 (Ctrl-C stops it)")
                    wait_while_served()
        except KeyboardInterrupt:
            sys.exit(130)


def _print_memory(plan: MemoryPlan, unknown_nodes: Sequence[str]) -> None:
    for name in unknown_nodes:
        announce(f"note: node-budgets names {name}, where nothing of this service runs")
    print_plan(plan)


def _print_placement(placed: Placed) -> None:
    from rich.console import Console

    from gateway.service.placement_view import render_placement

    Console(stderr=True, highlight=False).print(render_placement(placed))
