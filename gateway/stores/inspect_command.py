"""`sage-moe inspect`: what a store holds and how much memory it takes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gateway.command_line import StoreArgument, announce


def inspect(
    store: StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a store holds and how much memory it takes."""
    from rich.console import Console

    from extraction.summary import summarize
    from gateway.stores.inspect_view import render_summary
    from gateway.stores.source import resolve_store

    summary = summarize(resolve_store(store, announce=announce))
    if as_json:
        typer.echo(json.dumps(summary.as_json(), indent=2))
    else:
        Console(highlight=False).print(render_summary(summary))
