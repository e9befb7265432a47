"""`sage-moe extract`: parses and prints; the work is in `extraction`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from gateway.command_line import announce
from gateway.stores.quantise_options import (
    BackboneOption,
    GroupSizeOption,
    HeadOption,
    QuantizeOption,
    read_quantised,
)

if TYPE_CHECKING:
    from extraction.copying import Progress
    from extraction.extract import ExtractionReport
    from extraction.hub import HubId
    from extraction.manifest import LeftOut
    from extraction.quantised_parts import QuantisedParts
    from extraction.selection import Selection


class WeightDtype(StrEnum):
    """What a store's weights can be converted to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def extract(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, the name of a bundled model, or a hub id: ORG/NAME or ORG/NAME@REVISION."
        ),
    ],
    dest: Annotated[
        Path,
        typer.Argument(help="The store to write, which must not exist; with --verify, the one to check."),
    ],
    index_only: Annotated[
        bool, typer.Option("--index-only", help="Copy no weights: point into the original shards.")
    ] = False,
    layers: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(metavar="0-7,12", help="Only these layers: a partial store, which cannot be served."),
    ] = None,
    components: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,...", help="Only these components: a partial store."),
    ] = None,
    groups: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="1/4", help="Only these of so many groups of experts: a partial store."),
    ] = None,
    dtype: Annotated[
        Optional[WeightDtype],  # noqa: UP045
        typer.Option(help="Convert all weights; default: as they are."),
    ] = None,
    quantize: QuantizeOption = None,
    quantize_backbone: BackboneOption = None,
    quantize_head: HeadOption = None,
    group_size: GroupSizeOption = None,
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source", help="Of a hub id: keep no shard longer than it is needed, to save disk."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing: prove that DEST holds every tensor of SOURCE.")
    ] = False,
) -> None:
    """Split a checkpoint into an expert store, or prove that a store holds a checkpoint."""
    from gateway.stores.source import hub_id_of, published_checkpoint

    if verify:
        others = (layers, components, groups, dtype, quantize, quantize_backbone, quantize_head, group_size)
        if index_only or discard_source or any(others):
            raise typer.BadParameter("--verify takes no other option: the store says how it was made")
        return _verify(dest, published_checkpoint(source))
    hub_id = hub_id_of(source)
    if discard_source and (hub_id is None or index_only):
        raise typer.BadParameter(
            "--discard-source is for copying from a hub id; it removes nobody's own files"
        )
    chosen = _selection(layers, components, groups)
    quantised = read_quantised(quantize, quantize_backbone, quantize_head, group_size)
    if hub_id is not None and not index_only:
        return _from_hub(hub_id, dest, chosen, dtype, quantised, discard_source)
    folder = published_checkpoint(source) if hub_id is None else _downloaded(hub_id)
    return _from_folder(folder, dest, chosen, dtype, quantised, index_only)


def _selection(layers: str | None, components: str | None, groups: str | None) -> Selection:
    from extraction.selection import Selection, parse_components, parse_groups, parse_layers

    return Selection(
        None if layers is None else parse_layers(layers),
        None if components is None else parse_components(components),
        None if groups is None else parse_groups(groups),
    )


def _downloaded(hub_id: HubId) -> Path:
    from extraction.hub_extract import hub_snapshot

    return hub_snapshot(hub_id, announce=announce)


def _from_hub(
    hub_id: HubId,
    dest: Path,
    selection: Selection,
    dtype: WeightDtype | None,
    quantised: QuantisedParts,
    discards: bool,
) -> None:
    from extraction.hub_extract import extract_from_hub

    with _progress_bar() as progress:
        report = extract_from_hub(
            hub_id,
            dest,
            announce=announce,
            discard_source=discards,
            selection=selection,
            dtype=None if dtype is None else dtype.value,
            quantised=quantised,
            progress=progress,
        )
    _print_report(report, quantised)


def _from_folder(
    source: Path,
    dest: Path,
    selection: Selection,
    dtype: WeightDtype | None,
    quantised: QuantisedParts,
    index_only: bool,
) -> None:
    from extraction.extract import extract as run

    with _progress_bar() as progress:
        report = run(
            source,
            dest,
            index_only=index_only,
            selection=selection,
            dtype=None if dtype is None else dtype.value,
            quantised=quantised,
            progress=progress,
        )
    _print_report(report, quantised)


def _print_report(report: ExtractionReport, quantised: QuantisedParts) -> None:
    done = "copied" if report.kind == "copied" else "indexed in place"
    if quantised.name is not None:
        done = f"quantised to {quantised.name}"
    resumed = f", {_mib(report.resumed_bytes)} of them by an earlier run" if report.resumed_bytes else ""
    typer.echo(
        f"{report.root}: {report.num_experts} experts in {report.num_layers} layers, "
        f"{_mib(report.weight_bytes)} of weights {done}{resumed}{_partial(report.left_out)}"
    )


def _verify(store: Path, source: Path) -> None:
    from extraction.verify import verify

    with _progress_bar() as progress:
        report = verify(store, source, progress=progress)
    typer.echo(
        f"{store} holds {source}: {report.num_experts} experts and {report.num_backbone_tensors} other tensors, "
        f"{_mib(report.weight_bytes)}, bit for bit, or converted or quantised as recorded{_partial(report.left_out)}"
    )


def _partial(left_out: LeftOut | None) -> str:
    return "" if left_out is None else "; partial, as asked for: it cannot be served"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


@contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """A bar with rate and remaining time on stderr, from the first byte on; nothing when that is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=None)

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
