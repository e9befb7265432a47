"""`sage-moe store`: what can be done with a store beside extracting, inspecting and serving it."""

from __future__ import annotations

import typer

from gateway.stores.share_command import share, sync
from gateway.stores.trust_command import trust

store = typer.Typer(no_args_is_help=True, help="Look after an expert store.")
store.add_typer(trust, name="trust")
store.command()(share)
store.command()(sync)
