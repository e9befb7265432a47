"""What commands share: the argument STORE, and where they say what they prepare."""

from __future__ import annotations

from typing import Annotated

import typer

StoreArgument = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="An expert store, a checkpoint folder, the name of a bundled model (stories), or a hub id.",
    ),
]


def announce(line: str) -> None:
    """To standard error: standard output is for results."""
    typer.echo(line, err=True)
