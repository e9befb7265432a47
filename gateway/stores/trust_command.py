"""`sage-moe store trust show|export|reset`: what is known of a store's experts, for people and other programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from gateway.command_line import StoreArgument, announce

if TYPE_CHECKING:
    from experts.trust import TrustTable
    from experts.trust_ledger import TrustIdentity

trust = typer.Typer(no_args_is_help=True, help="What was learned about a store's experts (docs/trust.md).")

ComponentOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(metavar="NAME", help="Of a store with several; default: the one that is served."),
]
StateOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="FOLDER", help="Where trust is kept. [~/.local/state/sage-moe]"),
]


@trust.command()
def show(
    store: StoreArgument,
    top: Annotated[int, typer.Option(min=1, max=100_000, help="Experts shown at each end.")] = 10,
    component: ComponentOption = None,
    state_dir: StateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, of all experts.")] = False,
) -> None:
    """Show the most and the least trusted experts, with the parts of their scores."""
    from rich.console import Console

    from experts.trust import TrustSettings
    from gateway.stores.trust_view import render_trust, trust_as_json, trust_rows

    path, identity, table = _read(store, component, state_dir)
    rows = trust_rows(table, TrustSettings())
    if as_json:
        typer.echo(json.dumps(trust_as_json(identity, table, rows), indent=2))
    else:
        Console(highlight=False).print(render_trust(path, table, rows, top))


@trust.command()
def export(
    store: StoreArgument,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="A file ending with .json, .csv or .parquet.")
    ],
    component: ComponentOption = None,
    state_dir: StateOption = None,
) -> None:
    """Write one row an expert: scores and numbers of observations."""
    from experts.trust import TrustSettings
    from gateway.errors import OptionInvalid
    from gateway.stores.trust_view import encode_trust, trust_rows

    _, identity, table = _read(store, component, state_dir)
    rows = trust_rows(table, TrustSettings())
    raw = encode_trust(output.name, identity, table, rows)
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        beside.write_bytes(raw)
        beside.replace(output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OptionInvalid("OUTPUT", f"{output} cannot be written: {error.strerror}") from error
    typer.echo(f"{len(rows)} experts in {output}")


@trust.command()
def reset(
    store: StoreArgument,
    state_dir: StateOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget what was learned about a store, of all its components and quantisations."""
    from experts.trust_ledger import reset_ledger

    path, _ = _place(store, None, state_dir)
    if not yes:
        typer.confirm(f"Forget everything in {path}?", abort=True)
    typer.echo(f"{path} is forgotten" if reset_ledger(path) else f"nothing is kept at {path}")


def _place(store: str, component: str | None, state_dir: str | None) -> tuple[Path, TrustIdentity]:
    from experts.store import ExpertStore
    from experts.trust_ledger import ledger_path
    from gateway.service.state_folder import resolve_state_folder
    from gateway.stores.source import resolve_store
    from router.trust_session import trust_identity

    opened = ExpertStore.open(resolve_store(store, announce=announce))
    try:
        identity = trust_identity(opened, component)
    finally:
        opened.close()
    return ledger_path(resolve_state_folder(state_dir), identity.store_hash), identity


def _read(store: str, component: str | None, state_dir: str | None) -> tuple[Path, TrustIdentity, TrustTable]:
    from experts.trust_ledger import read_ledger

    path, identity = _place(store, component, state_dir)
    return path, identity, read_ledger(path, identity)
