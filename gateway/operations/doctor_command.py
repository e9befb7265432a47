"""`sage-moe doctor`: looks at this machine and at a running cluster, and says how to mend what it finds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cluster.errors import ClusterRefused, TokenUnusable

if TYPE_CHECKING:
    from cluster.findings import Finding
    from cluster.head_probe import HeadFacts
    from cluster.joining import RunningRay
    from cluster.node_report import NodeReport
    from cluster.ray_token import Token
    from gateway.operations.doctor_view import Examination

Word = Optional[str]  # noqa: UP045 - typer reads the annotation at run time


def doctor(
    head: Annotated[
        Word,
        typer.Argument(
            metavar="[HEAD[:PORT]]", help="The cluster's head; default: of the Ray that runs here."
        ),
    ] = None,
    store: Annotated[
        Word,
        typer.Option(metavar="STORE", help="The store to be served: who has it, and who has room for it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine and the cluster, and say how to mend what is wrong."""
    from gateway.operations.doctor_view import render

    examination = examine(head, store)
    typer.echo(json.dumps(examination.as_json(), indent=2) if as_json else render(examination), nl=as_json)
    if examination.has_failed:
        raise typer.Exit(1)


def examine(head: str | None, store: str | None) -> Examination:
    """Everything that can be found out from here."""
    from cluster.local_ray import AUTO, local_rays
    from gateway.operations.doctor_view import Examination

    token, findings = _read_token()
    question, store_bytes = _read_store(store) if store is not None else (None, None)
    if head is None and not local_rays():
        findings += [*_check_here(store_bytes), _nothing_runs()]
        return Examination(tuple(findings))
    running = _find(head or AUTO, token)
    if running is None:
        facts, more = _look_at(str(head), token)
        return Examination((*findings, *more, *_check_here(store_bytes)), facts)
    findings += running.findings
    if not _is_usable(running):
        return Examination((*findings, *_check_here(store_bytes)), running.head)
    reports, more = _visit(running, question, store_bytes)
    return Examination((*findings, *more), running.head, reports)


def _read_token() -> tuple[Token | None, list[Finding]]:
    from cluster.head_checks import check_token_file
    from cluster.ray_token import find_token

    try:
        token = find_token(os.environ, Path.home())
    except TokenUnusable as error:
        return None, [check_token_file(None, str(error))]
    return token, [check_token_file(token)]


def _read_store(store: str) -> tuple[Any, int]:
    """What nodes are asked about it, and its size."""
    from cluster.node_report import ExpertShape, StoreQuestion
    from experts.store import ExpertStore
    from extraction.manifest import store_hash
    from gateway.stores.source import resolve_runnable
    from router.loading import stored_dtype
    from router.model_config import read_model_config

    root = resolve_runnable(store, announce=lambda line: typer.echo(line, err=True)).resolve()
    opened = ExpertStore.open(root)
    try:
        config = read_model_config(opened.served.config)
        shape = ExpertShape(config.hidden_size, config.expert_width, stored_dtype(opened))
        records = [opened.record(key) for key in opened.expert_keys()]
        files = tuple(dict.fromkeys(part.file for record in records for part in record.parts))
        num_bytes = sum(record.nbytes for record in records)
    finally:
        opened.close()
    return StoreQuestion(str(root), store_hash(root), shape, files), num_bytes


def _check_here(store_bytes: int | None) -> list[Finding]:
    from cluster.machine_checks import check_machine
    from cluster.machine_facts import read_machine

    return check_machine(read_machine(), "here", store_bytes)


def _nothing_runs() -> Finding:
    from cluster.findings import ok

    return ok(
        "here", "no Ray runs on this machine, so nothing else was looked at (`sage-moe serve` starts its own)"
    )


def _find(address: str, token: Token | None) -> RunningRay | None:
    """None where this machine is no node of the cluster at `address`."""
    from cluster.joining import find_running_ray
    from cluster.local_ray import AUTO

    try:
        return find_running_ray(address, token)
    except ClusterRefused:
        if address == AUTO:
            raise
        return None


def _look_at(address: str, token: Token | None) -> tuple[HeadFacts, list[Finding]]:
    """A head from outside of its cluster."""
    from cluster.findings import warning
    from cluster.head_checks import check_head, check_versions
    from cluster.head_probe import parse_head, probe_head
    from cluster.machine_facts import read_versions

    facts = probe_head(parse_head(address), token)
    findings = check_head(facts, token, is_local_only=False)
    findings += check_versions(facts, read_versions())
    what = "this machine is no node of that cluster, so its nodes were not looked at"
    return facts, [*findings, warning("here", what, f"sage-moe join {address}, or run this on the head")]


def _is_usable(running: RunningRay) -> bool:
    from cluster.findings import failures

    return running.head.is_open or not failures(running.findings)


def _visit(
    running: RunningRay, question: Any, store_bytes: int | None
) -> tuple[Sequence[NodeReport], list[Finding]]:
    """Ask every node. Raises ClusterRefused."""
    from cluster.cluster_checks import check_cluster
    from cluster.findings import ok
    from cluster.joining import connected

    with connected(running):
        from cluster.lease import describe, is_alive, read_lease
        from cluster.ray_topology import gather

        reports, lease = gather(question), read_lease()
        findings = check_cluster(reports, store_bytes)
        if lease is not None and is_alive(lease):
            findings.append(ok("cluster", f"a service runs: {describe(lease)}"))
        return reports, findings
