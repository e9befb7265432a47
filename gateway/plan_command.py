"""`sage-moe plan`: whether a model fits some machines, how fast it will be, and how to start it. Options and output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from gateway.quantise_options import (
    BackboneOption,
    GroupSizeOption,
    HeadOption,
    QuantizeOption,
    read_quantised,
)

if TYPE_CHECKING:
    from cluster.placement import Grouping
    from gateway.nodes_file import NodesFile

DEFAULT_CONTEXT = 4096


def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="HUB_ID|STORE|CHECKPOINT|CONFIG",
            help="A hub id, an expert store, a checkpoint folder, a config.json, or a bundled model (stories).",
        ),
    ],
    nodes: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(metavar="FILE", help="YAML with the machines (docs/placement.md); default: this one."),
    ] = None,
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=2, metavar="TOKENS", help="Most of prompt and answer, for each stream. [4096, or the model's]"
        ),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=512, help="Requests computed at the same time.")] = 1,
    grouping: Annotated[
        str, typer.Option(help="expert: each layer over all machines; layer: whole layers to machines.")
    ] = "expert",
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="A routing trace of this model, for how often experts are used; default: evenly.",
        ),
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help="float32 or bfloat16; default: as stored.")] = None,  # noqa: UP045
    quantize: QuantizeOption = None,
    quantize_backbone: BackboneOption = None,
    quantize_head: HeadOption = None,
    group_size: GroupSizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a model fits some machines, how it would be placed, and how fast it would be. Starts nothing."""
    from rich.console import Console

    from gateway.errors import OptionInvalid
    from gateway.nodes_file import read_nodes
    from gateway.plan_demand import traced_demand
    from gateway.plan_nodes import Workload, plan_topology
    from gateway.plan_report import make_report
    from gateway.plan_source import read_model
    from gateway.plan_view import render_plan

    if grouping not in ("expert", "layer"):
        raise OptionInvalid("--grouping", f"must be expert or layer, not {grouping[:40]!r}")
    machines = _this_machine() if nodes is None else read_nodes(nodes)
    quantised = read_quantised(quantize, quantize_backbone, quantize_head, group_size)
    model = read_model(source, dtype, quantised)
    most = model.sizes.config.max_position_embeddings
    if context is not None and context > most:
        raise OptionInvalid("--context", f"must be at most the model's {most} tokens, not {context}")
    workload = Workload(context or min(DEFAULT_CONTEXT, most), streams)
    topology = plan_topology(machines, model.sizes, workload)
    demand = model.sizes.uniform_demand() if trace is None else traced_demand(trace, model.sizes)
    memory_bytes = next(node.memory for node in machines.nodes if node.name == topology.router_node)
    way: Grouping = "expert" if grouping == "expert" else "layer"
    report = make_report(model, topology, demand, workload, way, memory_bytes)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        Console(highlight=False, soft_wrap=True).print(render_plan(report))


def _this_machine() -> NodesFile:
    from experts.numerics import num_cores
    from gateway.memory import this_node
    from gateway.plan_nodes import this_machine

    node = this_node()
    return this_machine(node.name, node.memory, num_cores())
