"""Whether the nodes of a cluster fit together: from their reports to findings, each with its mend. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from cluster.findings import Finding, failure, ok, warning
from cluster.machine_checks import check_machine
from cluster.machine_facts import Versions
from cluster.node_report import NodeReport

MIB = 1 << 20
EVERYWHERE = "cluster"
WANTED_LINK_BYTES_S = 100e6
"""A little below what 1 Gb/s carries."""
WANTED_ROUND_TRIP_S = 1e-3
"""A model with 48 layers pays it 48 times a token."""
WANTED_DISK_BYTES_S = 200e6


def check_cluster(reports: Sequence[NodeReport], store_bytes: int | None = None) -> list[Finding]:
    """Everything that can be told of a cluster whose head answers. store_bytes: of a store that was looked for."""
    findings = check_versions(reports)
    findings += check_arithmetic(reports)
    for report in reports:
        findings += check_node(report, store_bytes)
    return findings


def check_node(report: NodeReport, store_bytes: int | None = None) -> list[Finding]:
    """One node: what it is, and how fast it is reached and reads."""
    if report.machine is None:
        mend = (
            "install the same sage-moe there, restart its Ray (sage-moe join), or take it out of the cluster"
        )
        return [failure(report.name, f"the node tells nothing: {report.problem}", mend)]
    findings = check_machine(report.machine, report.name, store_bytes)
    findings.append(_check_disk(report))
    if store_bytes is not None:
        findings.append(_check_store(report))
    if not report.is_here:
        findings.append(_check_link(report))
    return findings


def _check_store(report: NodeReport) -> Finding:
    if report.has_store:
        return ok(report.name, "it has the store")
    if report.is_here:
        return failure(report.name, "it does not have the store", "run this where the store is")
    return warning(
        report.name, "it does not have the store", "copy it to the same path there, or share the folder"
    )


def _check_disk(report: NodeReport) -> Finding:
    what = f"its disk gives {report.disk_bytes_s / 1e6:.0f} MB/s"
    if not report.disk_bytes_s:
        return warning(
            report.name, "its disk could not be measured", "give --store-cache a folder that can be written"
        )
    if report.disk_bytes_s < WANTED_DISK_BYTES_S:
        return warning(
            report.name, f"{what}: experts that are not in memory will be slow", "put --store-cache on an SSD"
        )
    return ok(report.name, what)


def _check_link(report: NodeReport) -> Finding:
    if report.link is None:
        mend = f"open all ports between the machines: on {report.address}, ufw allow from THIS_MACHINE"
        return failure(report.name, f"its ports cannot be reached from here ({report.link_problem})", mend)
    rate, round_trip = report.link.bandwidth_bytes_s, report.link.round_trip_s
    what = f"reached at {rate / 1e6:.0f} MB/s, {1e6 * round_trip:.0f} µs there and back"
    if rate < WANTED_LINK_BYTES_S:
        return warning(
            report.name, what, "use a wired network of 1 Gb/s or more (ethtool DEVICE shows what it runs at)"
        )
    if round_trip > WANTED_ROUND_TRIP_S:
        return warning(
            report.name, what, "put the machines on one switch: every layer of every token waits so long"
        )
    return ok(report.name, what)


def check_versions(reports: Sequence[NodeReport]) -> list[Finding]:
    """The same software everywhere. Another Torch computes other bits, the rest does not work together at all."""
    mends: tuple[tuple[str, Callable[[Versions], str], bool, str], ...] = (
        ("sage-moe", lambda v: f"{v.sage_moe} (code {v.code})", True, "install the same wheel on every node"),
        ("Ray", lambda v: v.ray, True, "pip install the head's version on every node"),
        ("Python", lambda v: v.python, True, "make the environments anew with the head's Python"),
        (
            "Torch",
            lambda v: v.torch,
            False,
            "pip install the head's version everywhere, or answers may differ by node",
        ),
    )
    findings = []
    for name, value, is_needed, mend in mends:
        groups = _grouped(reports, lambda report, value=value: value(report.machine.versions))  # type: ignore[misc]
        if len(groups) == 1:
            findings.append(ok(EVERYWHERE, f"{name} {next(iter(groups))} on all nodes"))
        elif groups:
            level = failure if is_needed else warning
            findings.append(level(EVERYWHERE, f"{name} differs: {_listed(groups)}", mend))
    return findings


def check_arithmetic(reports: Sequence[NodeReport]) -> list[Finding]:
    """Which nodes compute equal bits: by the names of their classes, and by the bits of a product that each made."""
    computing = [report for report in reports if report.arithmetic is not None]
    findings = [
        failure(
            report.name,
            "no product of its library is exact for every number of rows",
            "install the head's Torch",
        )
        for report in computing
        if report.arithmetic is not None and not report.arithmetic.numerics_class
    ]
    able = [
        report for report in computing if report.arithmetic is not None and report.arithmetic.numerics_class
    ]
    classes = _grouped(able, lambda report: report.arithmetic.numerics_class)  # type: ignore[union-attr]
    if len(classes) == 1:
        findings.append(ok(EVERYWHERE, f"all nodes are of numerics class {next(iter(classes))}"))
    elif classes:
        mend = "equal bits are promised within a class only (docs/exactness.md): leave the others out if you need them"
        findings.append(warning(EVERYWHERE, f"{len(classes)} numerics classes: {_listed(classes)}", mend))
    for name, members in classes.items():
        digests = _grouped(members, lambda report: report.arithmetic.digest)  # type: ignore[union-attr]
        if len(digests) > 1:
            what = f"nodes of class {name} computed different bits: {_listed(digests)}"
            findings.append(
                failure(EVERYWHERE, what, "leave out the odd one: its processor or library is at fault")
            )
    return findings


def _grouped(reports: Iterable[NodeReport], key: Callable[[NodeReport], str]) -> dict[str, list[NodeReport]]:
    """The nodes that told something, by a property."""
    groups: defaultdict[str, list[NodeReport]] = defaultdict(list)
    for report in reports:
        if report.machine is not None:
            groups[key(report)].append(report)
    return dict(groups)


def _listed(groups: dict[str, list[NodeReport]]) -> str:
    return "; ".join(
        f"{value} on {', '.join(report.address for report in members)}" for value, members in groups.items()
    )
