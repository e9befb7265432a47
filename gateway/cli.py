"""The command `sage-moe`: what it can do, and where its errors end.

The commands are beside their subjects, and import what is heavy when they run.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn

import typer

from cluster.errors import ClusterError, HeadLost
from experts.errors import ExpertError
from extraction.errors import ExtractionError, one_line
from gateway.batch.command import batch
from gateway.chat.command import chat
from gateway.errors import GatewayError
from gateway.evaluation.command import evaluate
from gateway.local.command import generate
from gateway.operations.doctor_command import doctor
from gateway.operations.join_command import join
from gateway.operations.status_command import status
from gateway.planning.command import plan
from gateway.service.command import serve
from gateway.stores.command import store as store_app
from gateway.stores.compare_command import compare
from gateway.stores.extract_command import extract
from gateway.stores.inspect_command import inspect
from router.errors import RouterError

app = typer.Typer(
    name="sage-moe",
    help="Serve Mixture-of-Experts models whose experts do not fit where you want to run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point. Errors that a user can act on are one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except HeadLost as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(1)  # at an exit in order, what Ray has left in this process would end it by a signal
    except (ExtractionError, ExpertError, RouterError, ClusterError, GatewayError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.exit(1)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        try:
            typer.echo(f"sage-moe {version('sage-moe')}")
        except PackageNotFoundError:
            typer.echo("sage-moe (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of all commands."""


app.command()(extract)


app.command()(inspect)
app.command()(generate)
app.command()(serve)
app.command()(plan)
app.command()(chat)
app.command()(batch)
app.add_typer(store_app, name="store")
app.command("eval")(evaluate)
app.command()(compare)
app.command()(join)
app.command()(doctor)
app.command()(status)


if __name__ == "__main__":
    main()
