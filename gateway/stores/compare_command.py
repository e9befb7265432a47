"""The command `sage-moe compare`: options, one line a layer, and the verdict.

The work is `gateway.stores.comparison`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from gateway.command_line import announce
from gateway.errors import OptionInvalid

if TYPE_CHECKING:
    from gateway.stores.comparison import Comparison
    from gateway.stores.layer_difference import LayerDifference

MAX_TOKENS = 4096


def compare(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint folder, a bundled model's name, or a hub id."
        ),
    ],
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="The store that was extracted from it, whole or partial.")
    ],
    layers: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(metavar="0-3,12", help="Only these layers; default: all that the store has."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, max=MAX_TOKENS, help="Length of the text of random tokens.")
    ] = 128,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random tokens.")] = 0,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="For a layer's weights and rows, such as 4GiB.")
    ] = "4GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a store's layers with what transformers computes from the checkpoint; exit code 1 where one is off."""
    from extraction.selection import parse_layers
    from gateway.byte_sizes import parse_bytes
    from gateway.stores.comparison import ComparisonOptions
    from gateway.stores.comparison import compare as run
    from gateway.stores.source import resolve_store

    try:
        memory_bytes = parse_bytes(memory)
    except ValueError as error:
        raise OptionInvalid("--memory", str(error)) from error
    wanted = None if layers is None else parse_layers(layers)
    options = ComparisonOptions(wanted, tokens, seed, memory_bytes)
    folder, root = _checkpoint(checkpoint), resolve_store(store, announce=announce)
    if not as_json:
        typer.echo(f"{'layer':>5}  {'worst':>9}  {'relative':>9}  {'rerouted':>8}")
    result = run(folder, root, options, _keep_quiet if as_json else _print_layer)
    typer.echo(json.dumps(result.as_json()) if as_json else _verdict(result))
    if not result.is_within:
        raise typer.Exit(1)


def _checkpoint(source: str) -> Path:
    from gateway.stores.source import hub_id_of, published_checkpoint

    hub_id = hub_id_of(source)
    if hub_id is None:
        return published_checkpoint(source)
    from extraction.hub_extract import hub_snapshot

    return hub_snapshot(hub_id, announce=announce)


def _print_layer(found: LayerDifference) -> None:
    numbers = f"{found.layer:>5}  {found.worst:>9.2e}  {found.relative:>9.2e}  {found.rerouted:>8.1%}"
    typer.echo(f"{numbers}  {'within' if found.is_within else 'OUTSIDE'}")


def _keep_quiet(_found: LayerDifference) -> None:
    """For an answer that is printed at the end."""


def _verdict(result: Comparison) -> str:
    from gateway.stores.layer_difference import TOLERANCE

    outside = [str(layer.layer) for layer in result.layers if not layer.is_within]
    if outside:
        names = f"layer {outside[0]} is" if len(outside) == 1 else f"layers {', '.join(outside)} are"
        why = f"; the store is quantised ({result.quantization})" if result.quantization else ""
        return f"{names} outside the tolerance of {TOLERANCE:g}{why}"
    return f"all {len(result.layers)} layers agree with transformers within {TOLERANCE:g}"
