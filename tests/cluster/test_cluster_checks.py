"""Whether the nodes of a cluster fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.cluster_checks import check_cluster
from cluster.findings import Finding
from cluster.link_rate import Link
from tests.cluster.machines import ARITHMETIC, VERSIONS, machine, node

HERE = node("192.0.2.1", is_here=True, is_head=True, link=None)


def _wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


def test_equal_nodes_have_no_fault() -> None:
    assert not _wrong(check_cluster([HERE, node()]))


@pytest.mark.parametrize(
    ("field", "level", "mend"),
    [
        ("sage_moe", "failure", "same wheel"),
        ("code", "failure", "same wheel"),
        ("ray", "failure", "head's version"),
        ("python", "failure", "head's Python"),
        ("torch", "warning", "head's version"),
    ],
)
def test_versions_that_differ_are_named_with_their_nodes(field: str, level: str, mend: str) -> None:
    odd = node(machine=machine(versions=replace(VERSIONS, **{field: "other"})))
    (finding,) = _wrong(check_cluster([HERE, odd]))
    assert finding.level == level
    assert "other" in finding.what and "192.0.2.7" in finding.what
    assert mend in finding.mend


def test_nodes_of_another_class_are_a_warning_and_other_bits_in_one_class_a_failure() -> None:
    other_class = node(arithmetic=replace(ARITHMETIC, numerics_class="cpu/avx2/x", digest="d2"))
    (finding,) = _wrong(check_cluster([HERE, other_class]))
    assert finding.level == "warning"
    assert "2 numerics classes" in finding.what
    other_bits = node(arithmetic=replace(ARITHMETIC, digest="d2"))
    (finding,) = _wrong(check_cluster([HERE, other_bits]))
    assert finding.level == "failure"
    assert "different bits" in finding.what


def test_node_without_an_exact_product_cannot_serve() -> None:
    findings = _wrong(check_cluster([HERE, node(arithmetic=replace(ARITHMETIC, numerics_class=""))]))
    assert [finding.level for finding in findings] == ["failure"]


def test_node_that_tells_nothing_or_is_out_of_reach_is_a_failure() -> None:
    silent = node(machine=None, arithmetic=None, link=None, problem="no module cluster")
    (finding,) = _wrong(check_cluster([HERE, silent]))
    assert (finding.level, finding.where) == ("failure", "192.0.2.7")
    assert "no module cluster" in finding.what
    (finding,) = _wrong(check_cluster([HERE, node(link=None, link_problem="timed out")]))
    assert finding.level == "failure"
    assert "cannot be reached from here (timed out)" in finding.what


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ({"link": Link(11e6, 80e-6)}, "1 Gb/s"),
        ({"link": Link(1e9, 20e-3)}, "one switch"),
        ({"disk_bytes_s": 90e6}, "SSD"),
        ({"disk_bytes_s": 0.0}, "--store-cache"),
    ],
)
def test_slow_links_and_disks_are_warnings(differs: dict[str, object], words: str) -> None:
    (finding,) = _wrong(check_cluster([HERE, node(**differs)]))
    assert finding.level == "warning"
    assert words in finding.mend
