"""`sage-moe store share` and `store sync`: options and what is printed; the work is in `gateway.stores.share`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from gateway.command_line import StoreArgument, announce

if TYPE_CHECKING:
    from gateway.stores.share import SyncRequest

Word = Optional[str]  # noqa: UP045 - typer reads the annotation at run time


def share(
    store: StoreArgument,
    secret_file: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Who has this secret gets the weights; made where it is not there."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; nothing is encrypted.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 0,
) -> None:
    """Give a store's records to other machines (`store sync --from`) until interrupted."""
    from gateway.service.launch import interruptible, wait_for_interrupt
    from gateway.stores.secret_file import make_secret, read_secret
    from gateway.stores.share import shared_store
    from gateway.stores.source import resolve_store

    if make_secret(secret_file):
        announce(f"{secret_file} holds a new secret; give it to the machines that fetch")
    secret = read_secret(secret_file)
    root = resolve_store(store, announce=announce)
    with interruptible():
        try:
            with shared_store(root, secret, host, port) as (_, address):
                typer.echo(f"{store} is shared at {address} (Ctrl-C stops it)")
                wait_for_interrupt()
        except KeyboardInterrupt:
            sys.exit(130)


def sync(
    to: Annotated[
        Path,
        typer.Option(
            "--to", metavar="DIR", help="The node's store cache, as `serve --store-cache` names it."
        ),
    ],
    store: Annotated[
        Word,
        typer.Argument(
            metavar="[STORE]", help="A store that this machine can read, on a shared disk perhaps."
        ),
    ] = None,
    servers: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--from", metavar="HOST:PORT", help="Where `store share` listens; repeatable."),
    ] = None,
    secret_file: Annotated[Word, typer.Option(metavar="FILE", help="The secret of --from.")] = None,
    address: Annotated[
        Word,
        typer.Option(
            metavar="auto|HOST:PORT", help="Of a Ray cluster all of whose machines get the records of STORE."
        ),
    ] = None,
    groups: Annotated[
        Word, typer.Option(metavar="1/4", help="Only the experts of these groups: actor experts-1 of four.")
    ] = None,
    layers: Annotated[Word, typer.Option(metavar="0-7,12", help="Only the experts of these layers.")] = None,
    limit: Annotated[
        Word,
        typer.Option(
            "--store-cache-limit", metavar="SIZE", help="Most bytes of records in DIR, such as 40GiB."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Bring a store's expert records to this machine's disk ahead of time; goes on where it was stopped."""
    from extraction.selection import parse_groups, parse_layers
    from gateway.progress import shown_progress
    from gateway.stores.secret_file import read_secret
    from gateway.stores.share import SyncRequest, parse_address
    from gateway.stores.share import sync as run
    from gateway.stores.source import resolve_store

    if store is None and not servers:
        raise typer.BadParameter("name a STORE, or a machine that shares one with --from")
    if address is not None and (store is None or servers):
        raise typer.BadParameter("--address goes with a STORE on this machine, and without --from")
    if bool(servers) != (secret_file is not None):
        raise typer.BadParameter("--from and --secret-file go together")
    request = SyncRequest(
        to,
        None if store is None else resolve_store(store, announce=announce),
        tuple(map(parse_address, servers or ())),
        b"" if secret_file is None else read_secret(secret_file),
        None if layers is None else parse_layers(layers),
        None if groups is None else parse_groups(groups),
        None if limit is None else _size(limit),
    )
    if address is not None:
        assert request.store is not None, "checked above"
        _sync_cluster(request, request.store, address, as_json)
        return
    with shown_progress("experts") as show:
        report = run(request, show)
    progress = report.progress
    if as_json:
        typer.echo(json.dumps({"folder": str(report.folder), "hash": report.store_hash} | progress.as_json()))
        return
    fetched = sum(progress.fetched_bytes.values())
    typer.echo(
        f"{report.folder}: {progress.records_done} experts, {_mib(progress.bytes_done)}, {_mib(fetched)} of them new"
    )


def _sync_cluster(request: SyncRequest, store: Path, address: str, as_json: bool) -> None:
    from gateway.progress import shown_progress
    from gateway.stores.sync_cluster import sync_cluster

    with shown_progress("experts") as show:
        nodes = sync_cluster(request, store, address, show)
    if as_json:
        typer.echo(json.dumps({"nodes": [asdict(node) for node in nodes]}))
        return
    for node in nodes:
        if not node.records_total:
            typer.echo(f"{node.address}: has the store at {node.folder}")
        else:
            fetched = _mib(node.fetched_bytes)
            typer.echo(f"{node.address}: {node.folder}: {node.records_done} experts, {fetched} of them new")


def _size(text: str) -> int:
    from gateway.byte_sizes import parse_bytes
    from gateway.errors import OptionInvalid

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise OptionInvalid("--store-cache-limit", f"{error}, not {text[:80]!r}") from error


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
