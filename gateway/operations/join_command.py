"""`sage-moe join`: checks that this machine fits a cluster, and makes it a node for as long as the command runs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cluster.errors import ClusterRefused
from gateway.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.findings import Finding
    from cluster.node_start import NodeOptions

Number = Optional[int]  # noqa: UP045 - typer reads the annotation at run time
Word = Optional[str]  # noqa: UP045


def join(
    head: Annotated[str, typer.Argument(metavar="HEAD[:PORT]", help="The cluster's head. \\[port 6379]")],
    num_cpus: Annotated[Number, typer.Option(min=0, help="Cores that Ray may count. \\[all]")] = None,
    num_gpus: Annotated[Number, typer.Option(min=0, help="GPUs that Ray may count. \\[all]")] = None,
    memory: Annotated[
        Word, typer.Option(metavar="SIZE", help="Memory that Ray may count, such as 24GiB. \\[what is free]")
    ] = None,
    labels: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY=VALUE", help="Of this node, as Ray shows them; repeatable."),
    ] = None,
    store_cache: Annotated[
        Word,
        typer.Option(
            metavar="DIR", help="Where this node keeps copies of experts. [~/.cache/sage-moe/records]"
        ),
    ] = None,
    node_address: Annotated[
        Word, typer.Option(metavar="IP", help="By which of its addresses others reach this machine.")
    ] = None,
    block: Annotated[
        bool, typer.Option("--block/--no-block", help="Stay until Ctrl-C, then leave; or leave Ray running.")
    ] = True,
) -> None:
    """Make this machine a node of a Ray cluster."""
    from cluster.head_probe import parse_head
    from cluster.node_process import find_ray_command, run_to_end, running_node
    from cluster.node_start import (
        NodeOptions,
        parse_labels,
        raise_open_files,
        start_command,
        start_environment,
    )
    from gateway.service.launch import interruptible

    options = NodeOptions(
        parse_head(head),
        num_cpus,
        num_gpus,
        _read_memory(memory),
        node_address,
        parse_labels(labels or ()),
        None if store_cache is None else str(Path(store_cache).absolute()),
    )
    raise_open_files()
    _show(_check(options))
    command = start_command(find_ray_command(), options, block)
    environment = start_environment(options, os.environ)
    if not block:
        run_to_end(command, environment)
        typer.echo(f"this machine has joined {options.head}; `ray stop` leaves it")
        return
    with interruptible(), suppress(KeyboardInterrupt), running_node(command, environment) as node:
        typer.echo(f"this machine has joined {options.head} (Ctrl-C leaves it)")
        node.wait_lost()


def _check(options: NodeOptions) -> list[Finding]:
    """What may be said before. Raises ClusterRefused for the first thing that keeps this machine from joining."""
    from cluster.findings import failures
    from cluster.head_checks import check_head, check_token_file, check_versions
    from cluster.head_probe import probe_head
    from cluster.local_ray import check_not_joined, local_rays
    from cluster.machine_checks import check_machine
    from cluster.machine_facts import read_machine, read_versions
    from cluster.ray_token import find_token
    from experts.store_source import STORE_CACHE_VARIABLE

    check_not_joined(options.head, options.node_address, local_rays())
    token = find_token(os.environ, Path.home())
    facts = probe_head(options.head, token)
    findings = check_head(facts, token, is_local_only=False)
    findings += check_versions(
        facts, read_versions(), os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch")
    )
    cache = {STORE_CACHE_VARIABLE: options.store_cache} if options.store_cache else {}
    for finding in failures(findings):
        where = "" if finding.where == "here" else f"the Ray cluster at {finding.where}: "
        raise ClusterRefused(f"{where}{finding.what}", finding.mend)
    findings += check_machine(read_machine(dict(os.environ) | cache), "here")
    if token is not None:
        findings.append(check_token_file(token))
    for finding in failures(findings):
        raise ClusterRefused(finding.what, finding.mend)
    return findings


def _show(findings: Iterable[Finding]) -> None:
    for finding in findings:
        if finding.level == "warning":
            typer.echo(f"note: {finding.what}: {finding.mend}", err=True)


def _read_memory(text: str | None) -> int | None:
    from gateway.byte_sizes import parse_bytes

    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise OptionInvalid("--memory", str(error)) from error
