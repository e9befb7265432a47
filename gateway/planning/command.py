"""`sage-moe plan`: whether a model fits some machines, how fast it will be, and how to start it. Options and output."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from gateway.stores.quantise_options import (
    BackboneOption,
    GroupSizeOption,
    HeadOption,
    QuantizeOption,
    read_quantised,
)

if TYPE_CHECKING:
    from cluster.placement import Grouping
    from gateway.planning.nodes import Workload
    from gateway.planning.nodes_file import NodesFile
    from gateway.planning.report import PlanReport
    from gateway.planning.source import PlannedModel

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
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="auto|HOST:PORT", help="A Ray cluster whose machines are asked; goes with a store."
        ),
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
    speech: Annotated[
        bool, typer.Option("--speech/--no-speech", help="Leave room for what speaks. [--speech]")
    ] = True,
    quantize: QuantizeOption = None,
    quantize_backbone: BackboneOption = None,
    quantize_head: HeadOption = None,
    group_size: GroupSizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a model fits some machines, how it would be placed, and how fast it would be. Starts nothing."""
    from rich.console import Console

    from gateway.errors import OptionInvalid
    from gateway.planning.nodes import Workload
    from gateway.planning.source import read_model
    from gateway.planning.view import render_plan

    if grouping not in ("expert", "layer"):
        raise OptionInvalid("--grouping", f"must be expert or layer, not {grouping[:40]!r}")
    if nodes is not None and address is not None:
        raise OptionInvalid("--nodes", "describes machines, and --address asks them: give one of the two")
    quantised = read_quantised(quantize, quantize_backbone, quantize_head, group_size)
    model = read_model(source, dtype, quantised)
    model = model if speech else model.silent()
    most = model.sizes.config.max_position_embeddings
    if context is not None and context > most:
        raise OptionInvalid("--context", f"must be at most the model's {most} tokens, not {context}")
    workload = Workload(context or min(DEFAULT_CONTEXT, most), streams)
    way: Grouping = "expert" if grouping == "expert" else "layer"
    if address is None:
        report = _described(model, workload, nodes, way, trace)
    else:
        report = _asked(model, workload, address, way, trace)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        Console(highlight=False, soft_wrap=True).print(render_plan(report))


def _described(
    model: PlannedModel, workload: Workload, nodes: Path | None, grouping: Grouping, trace: Path | None
) -> PlanReport:
    """On the machines of a file, or this one."""
    from gateway.planning.demand import traced_demand
    from gateway.planning.nodes import plan_topology
    from gateway.planning.nodes_file import read_nodes
    from gateway.planning.report import ServeChoices, make_report

    machines = _this_machine() if nodes is None else read_nodes(nodes)
    topology = plan_topology(machines, model.sizes, workload)
    demand = model.sizes.uniform_demand() if trace is None else traced_demand(trace, model.sizes)
    memory_bytes = next(node.memory for node in machines.nodes if node.name == topology.router_node)
    is_one = len(topology.nodes) == 1
    choices = ServeChoices(
        None if is_one else "auto",
        grouping,
        None if trace is None else str(trace),
        "auto" if any(node.gpus for node in topology.nodes) else None,
        None if is_one or all(node.has_store for node in topology.nodes) else _cache_folder(),
    )
    return make_report(model, topology, demand, workload, choices, memory_bytes)


def _asked(
    model: PlannedModel, workload: Workload, address: str, grouping: Grouping, trace: Path | None
) -> PlanReport:
    """On the machines of a cluster, as `serve` would find them."""
    from gateway.planning.cluster import plan_on_cluster
    from gateway.planning.report import ServeChoices, make_report

    choices = ServeChoices(
        address, grouping, None if trace is None else str(trace), store_cache=_cache_folder()
    )
    placed = plan_on_cluster(model, workload, choices)
    topology = placed.topology
    if all(node.has_store for node in topology.nodes):
        choices = replace(choices, store_cache=None)
    return make_report(
        model,
        topology,
        placed.placing.demand,
        workload,
        choices,
        placed.memory.available_bytes,
        placed.names,
    )


def _cache_folder() -> str:
    from cluster.machine_facts import store_cache_folder

    return str(store_cache_folder(os.environ))


def _this_machine() -> NodesFile:
    from experts.cores import num_cores
    from gateway.planning.nodes import this_machine
    from gateway.service.memory import this_node

    node = this_node()
    return this_machine(node.name, node.memory, num_cores())
